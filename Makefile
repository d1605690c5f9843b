# `make demo` and `make test` set up what they need. Every target runs in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PORT ?= 3000
FAULTS := --latency-ms 20 --rate-429 0.02 --retry-after-s 1 --rate-500 0.02 --rate-malformed 0.03 --rate-400 0.004
RUN_DEMO := $(BIN)/modelcall rehearse $(FAULTS) -- $(BIN)/modelcall run-task

export DAGSTER_HOME := $(CURDIR)/dagster_home

.PHONY: setup demo ui test test-fast acceptance bench lint fmt types lock docs pictures clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -q modelcall_assets modelcall.py
	touch $(READY)

demo: setup  ## score and distil what is found on this machine, and evaluate, against the rehearsal endpoint
	$(BIN)/python demo/build_inputs.py data/demo
	$(RUN_DEMO) configs/tasks/demo_code_quality.yaml
	$(RUN_DEMO) configs/tasks/demo_distillation.yaml
	$(RUN_DEMO) configs/tasks/evaluation/evaluate_mixture.yaml
	@echo "look at it: make ui, then http://localhost:$(PORT)"

ui: setup  ## Dagster's UI and daemon, with the rehearsal endpoint beside them; PORT=3001 elsewhere
	$(BIN)/modelcall ui --rehearse --port $(PORT)

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: setup  ## what takes a minute in all: no Dagster instance, no kills, no stores
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

acceptance: setup  ## the UI in a browser, S3 on Ceph and more: acceptance/README.md; PART=test_browser.py
	$(BIN)/python -m pytest acceptance/$(PART) --timeout 600

bench: setup  ## docs/performance.md again; keep the machine quiet for the half hour it takes
	$(BIN)/python -m benchmarks --write

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/modelcall check

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: setup
	$(BIN)/pyright

pictures: setup  ## docs/ui/, from the tests of the UI; needs a Chromium on the PATH
	PICTURES=docs/ui $(BIN)/python -m pytest acceptance/test_browser.py

docs: setup  ## write the generated pages again
	$(BIN)/python docs/config_reference.py > docs/config.md

lock:  ## needs uv; the result names no host and holds every hash
	uv pip compile --universal --quiet --generate-hashes --no-strip-extras --no-annotate --no-header \
		--python-version 3.11 --all-extras --upgrade pyproject.toml -o requirements.lock

clean:
	rm -rf data/demo .pytest_cache .ruff_cache .hypothesis
