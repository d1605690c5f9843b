"""Evaluations: shipped tasks from their sources to their figures, which are those of the rows."""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
import yaml
from project import RED, Project, Row, read_rows, write_rows

from modelcall_assets.config.catalog import load_task
from modelcall_assets.defs.instance import latest_result
from modelcall_assets.rehearsal import Faults, RehearsalServer
from modelcall_assets.sources import SmolTalk
from modelcall_assets.stages.figures import Figures
from modelcall_assets.stages.task import Task

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "configs/tasks/evaluation").glob("*.yaml"))


@pytest.fixture
def shipped(bare: Project) -> Project:
    """With the shipped configs and samples."""
    shutil.rmtree(bare.root / "configs")
    shutil.copytree(ROOT / "configs", bare.root / "configs")
    (bare.root / "demo").mkdir()
    (bare.root / "demo/benchmarks").symlink_to(ROOT / "demo/benchmarks")
    return bare


def task_of(project: Project, name: str) -> Path:
    project.task = name
    return project.root / f"configs/tasks/evaluation/{name}.yaml"


def grades(project: Project) -> list[Row]:
    folder = project.root / f"data/{project.task}/grades"
    found = sorted(each for each in folder.rglob("*.parquet") if ".modelcall" not in each.parts)
    return [row for path in found for row in pq.read_table(path).to_pylist()]


def written(project: Project, name: str = "asked", **fields: Any) -> Path:
    """A task of a grader and a source."""
    project.task = name
    steps: dict[str, Any] = {
        "task_name": name,
        "task_type": "evaluation",
        "sources": {"data_dir": "demo/benchmarks", "output_dir": f"data/{name}/conversations"},
        "generate_response": {
            "response_config_path": "configs/models/rehearsal.yaml",
            "output_path": f"data/{name}/responses",
        },
        "grading": {"output_dir": f"data/{name}/grades"},
    }
    for block, own in fields.items():
        steps[block] = {**steps.get(block, {}), **own}
    file = project.root / f"configs/tasks/evaluation/{name}.yaml"
    file.write_text(yaml.safe_dump(steps))
    return file


class TestShipped:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_goes_from_its_source_to_figures_that_are_those_of_its_rows(
        self, shipped: Project, server: RehearsalServer, name: str
    ) -> None:
        file = task_of(shipped, name)
        ended = shipped.run("run-task", file)
        assert ended.code == 0, ended
        task, rows = Task(load_task(file, shipped.root)), grades(shipped)
        right, samples = defaultdict[str, list[bool]](list), task.stage("responses").samples
        for row in rows:
            right[f"{row['api_record_id']}"].append(row["correct"])
        assert {*map(len, right.values())} == {samples}
        (overview,) = task.overviews
        event = latest_result(shipped.instance, overview, None)
        assert event is not None
        accuracy = math.fsum(row["correct"] for row in rows) / len(rows)
        assert f"accuracy {accuracy:.4f}" in ended.out
        report, _ = overview.summed()
        assert (report.numbers["items"], report.numbers["accuracy"]) == (len(right), accuracy)
        assert report.numbers["accuracy_low"] <= accuracy <= report.numbers["accuracy_high"]
        compared = orjson.loads(shipped.run("compare", file, file, "--json").out)["figures"][0]["a"]
        names = {"value": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
        own = {name: pytest.approx(report.numbers[of], rel=1e-12) for name, of in names.items()}
        assert compared == {**own, "n": len(rows)}
        by_key = Counter[str]()
        for key in task.stage("scores").keys.now():
            made = task.stage("scores").accepted(key)
            assert made is not None
            own = pq.read_table(str(task.stage("scores").output(key)))["correct"].to_pylist()
            assert made.detail["numbers"]["accuracy"] == sum(own) / len(own)
            by_key[key] = len(own)
        assert by_key.total() == len(rows)
        requests = server.stats()["requests"]
        again = shipped.run("run-task", file)
        assert "nothing to do" in again.out and server.stats()["requests"] == requests

    @pytest.mark.parametrize("name", SHIPPED)
    def test_no_reference_is_sent(
        self, shipped: Project, server: RehearsalServer, name: str
    ) -> None:
        assert shipped.run("run-task", task_of(shipped, name)).code == 0
        for path in (shipped.root / f"data/{name}/responses").glob("*.jsonl"):
            for row in read_rows(path):
                *asked, reference = row["messages"]
                assert row["final_messages"][:-1] == asked
                assert (asked[-1]["role"], reference["role"]) == ("user", "assistant")


def test_killed_five_times_nothing_is_paid_twice(shipped: Project, server: RehearsalServer) -> None:
    sources = {"tasks": [{"name": "SpellingBee", "split": "test", "size": 120}]}
    file = written(shipped, sources=sources, generate_response={"concurrency": 8})
    server.set_faults(Faults(latency_ms=5, rate_hang=0.05))
    for _ in range(5):
        answered = server.stats()["answered"]
        shipped.signalled(lambda: server.stats()["answered"] >= answered + 10, "run-task", file)  # noqa: B023
    server.set_faults(Faults())
    assert shipped.run("run-task", file).code == 0
    assert server.stats()["repeated_ok"] <= 5 * 8
    assert server.stats()["distinct"] == 120 == len(grades(shipped))


def test_what_a_model_did_not_finish_is_graded_as_it_is(
    shipped: Project, server: RehearsalServer
) -> None:
    sources = {"tasks": [{"name": "ARC", "subset": "ARC-Easy", "split": "test"}]}
    file = written(shipped, sources=sources)
    server.set_faults(Faults(rate_truncated=1.0))
    assert shipped.run("run-task", file).code == 0
    rows, requests = grades(shipped), server.stats()["requests"]
    assert {row["api_status"] for row in rows} == {"success"}
    assert {row["finish_reason"] for row in rows} == {"length"}
    server.set_faults(Faults())
    assert "nothing" in shipped.run("retry", file).told, "no second chance"
    assert server.stats()["requests"] == requests


def test_a_data_set_that_is_not_there_is_red_and_says_how_to_get_it(
    shipped: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    sources = {
        "data_dir": "data/nowhere",
        "tasks": [{"name": "GSM8K", "subset": "main", "split": "test"}],
    }
    file = written(shipped, sources=sources)
    ended = shipped.run("run-task", file)
    assert ended.code == 1
    assert "hf download openai/gsm8k" in ended.err and "data/nowhere" in ended.err
    (status,) = shipped_statuses(shipped, file).values()
    assert status == RED


def shipped_statuses(project: Project, file: Path) -> dict[str, Any]:
    from modelcall_assets.defs.instance import asset_key, partitions_of

    stage = Task(load_task(file, project.root)).stage("raw")
    keys = project.instance.get_dynamic_partitions(partitions_of(stage.keys).name or "")
    found = project.instance.get_status_by_partition(
        asset_key(stage), keys, partitions_of(stage.keys)
    )
    return dict(found or {})


ARC = {"name": "ARC", "subset": "ARC-Easy", "split": "test"}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no such source": (
        {"sources": {"tasks": [{"name": "GSM9K"}]}},
        "sources.tasks[0].name: no source 'GSM9K'; expected one of ARC, MMLU",
    ),
    "no such split": (
        {"sources": {"tasks": [{"name": "GSM8K", "subset": "main", "split": "tests"}]}},
        "sources.tasks[0]: GSM8K: no split 'tests'; there are: ",
    ),
    "no such grader": (
        {"grading": {"grader": "numerics"}},
        "grading.grader: no such grader: numerics",
    ),
    "an option that is none": (
        {"grading": {"grader": "exact", "options": {"strip": "maybe"}}},
        "grading.options: strip: unknown value; expected false, true; have 'maybe'",
    ),
    "an option that is misspelt": (
        {"grading": {"grader": "choice", "options": {"in_sentance": True}}},
        "grading.options.in_sentance: unknown; expected one of by, in_sentence;"
        " did you mean in_sentence?",
    ),
    "an option of none": (
        {"grading": {"grader": "numeric", "options": {"strip": True}}},
        "grading.options.strip: unknown; leave it out",
    ),
    "an option that is not given": (
        {"grading": {"grader": "regex"}},
        "grading.options.pattern: missing",
    ),
    "an option of a source that is misspelt": (
        {"sources": {"tasks": [{"name": "GSM8K", "subset": "main", "splt": "test"}]}},
        "sources.tasks[0].splt: unknown; expected one of split, start, stop, step;"
        " did you mean split?",
    ),
    "an option of examples": (
        {"sources": {"tasks": [{**ARC, "few_shot": {"split": "train", "count": 3}}]}},
        "sources.tasks[0].few_shot.count: unknown; "
        "expected one of n, seed, ids, same, start, stop, step",
    ),
    "what is not asked for": (
        {"grading": {"grader": "choice", "options": {"by": "logprobs"}}},
        "grading.grader: needs generate_response.logprobs",
    ),
    "nobody says how it is graded": (
        {"sources": {"tasks": [{"name": "SmolTalk", "split": "test"}]}},
        "grading.grader: missing",
    ),
    "two with one name": (
        {"sources": {"tasks": [{"name": "GSM8K", "subset": "main", "split": "test"}] * 2}},
        "sources.tasks[1].as: another source is GSM8K-main-test.jsonl too",
    ),
    "examples of nothing": (
        {"sources": {"tasks": [{**ARC, "few_shot": 5}]}},
        "sources.tasks[0].few_shot: expected a mapping",
    ),
    "examples of a mixture": (
        {"sources": {"tasks": [{"name": "Mixture", "of": [ARC], "few_shot": {"n": 1}}]}},
        "sources.tasks[0].few_shot: not of several sources at once",
    ),
    "a mixture of nothing": (
        {"sources": {"tasks": [{"name": "Mixture", "of": []}]}},
        "sources.tasks[0].of: expected a list of sources",
    ),
    "a mixture of texts": (
        {"sources": {"tasks": [{"name": "Mixture", "of": ["ARC"]}]}},
        "sources.tasks[0].of: expected a list of sources",
    ),
    "a name that leaves the folder": (
        {"sources": {"tasks": [{**ARC, "as": "../arc"}]}},
        "sources.tasks[0].as: ../arc.jsonl: not a name for its file",
    ),
    "the first message alone": (
        {"generate_response": {"prompt_mode": "first_message"}},
        "generate_response.prompt_mode: not beside grading",
    ),
    "no source": ({"sources": {"tasks": []}}, "sources: expected either tasks or task_reader"),
    "without a name": ({"sources": {"tasks": [{"split": "test"}]}}, "sources.tasks[0]: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_by_file_and_field(shipped: Project, mistake: str) -> None:
    fields, told = MISTAKES[mistake]
    gsm8k = {"tasks": [{"name": "GSM8K", "subset": "main", "split": "test"}]}
    file = written(shipped, **{"sources": gsm8k, **fields})
    ended = shipped.run("check", file)
    assert ended.code == 1, ended
    assert f"configs/tasks/evaluation/asked.yaml:{told}" in ended.out
    assert "Traceback" not in ended.told


@pytest.mark.parametrize(
    "field", ["sources.output_dir", "generate_response.output_path", "grading.output_dir"]
)
def test_an_output_of_another_task_is_told_by_all_commands(
    shipped: Project, server: RehearsalServer, field: str
) -> None:
    step, _, name = field.partition(".")
    first: dict[str, Any] = {"sources": {"tasks": [ARC]}}
    written(shipped, "a", **first)
    taken = yaml.safe_load(task_of(shipped, "a").read_text())[step][name]
    file = written(shipped, "b", **{**first, step: {**first.get(step, {}), name: taken}})
    told = f"configs/tasks/evaluation/b.yaml:{field}: configs/tasks/evaluation/a.yaml writes to"
    for command in ("check", "plan", "try", "run-task"):
        ended = shipped.run(command, file)
        assert ended.code != 0 and told in ended.told, ended
    assert server.stats()["requests"] == 0


def test_plan_and_try_know_the_rows_of_a_source(shipped: Project) -> None:
    sources = {"tasks": [{"name": "MMLU", "subset": "all", "split": "test", "stop": 5}]}
    file = written(shipped, sources=sources, generate_response={"samples": 2})
    planned = shipped.run("plan", file)
    assert planned.code == 0 and "to send: about 10 requests" in planned.out, planned
    tried = shipped.run("try", file, "--rows", "1")
    assert tried.code == 0 and "Respond only with the letter" in tried.out, tried


def test_a_changed_sample_or_option_shows_as_out_of_date(
    shipped: Project, server: RehearsalServer
) -> None:
    copy = shipped.root / "data/own/openai/gsm8k"
    shutil.copytree(ROOT / "demo/benchmarks/openai/gsm8k", copy)
    own = {"data_dir": "data/own"}
    task = {"name": "GSM8K", "subset": "main", "split": "test"}
    file = written(shipped, sources={**own, "tasks": [task]})
    assert shipped.run("run-task", file).code == 0
    sample = copy / "main/test.jsonl"
    sample.write_text(sample.read_text().replace("?", "??", 1))
    requests = server.stats()["requests"]
    assert shipped.run("run-task", file).code == 0
    assert server.stats()["requests"] == requests + 1, "the row that changed"
    spelling = {"name": "SpellingBee", "split": "test", "size": 3}
    written(shipped, sources={**own, "tasks": [{**task, "stop": 4}, spelling]})
    planned = shipped.run("plan", file)
    assert "to send: about 3 requests" in planned.out, planned
    assert shipped.run("run-task", file).code == 0
    assert len(grades(shipped)) == 4 + 3 and server.stats()["requests"] == requests + 1 + 3
    made = Task(load_task(file, shipped.root)).stages
    rows = {key: [s.need(key).rows for s in made[:3]] for key in made[0].keys.now()}
    assert [*rows.values()] == [[4] * 3, [3] * 3]
    before = rows.keys() - {key for key in rows if "Spelling" in key}
    changed = written(
        shipped, sources={**own, "tasks": [{**task, "stop": 4}, spelling | {"size": 4}]}
    )
    first = Task(load_task(changed, shipped.root)).stages[0]
    assert first.outdated([*rows]) == rows.keys() - before, "the others are as they were"


def test_what_will_be_fetched_is_told_and_nothing_is(
    shipped: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder that is not there is no reason to wait."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    words = {"name": "SpellingBee", "word_list": "http://127.0.0.1:9/words", "as": "words"}
    tasks = [{"name": "GSM8K", "subset": "main", "split": "test", "few_shot": {"split": "train"}}]
    file = written(shipped, sources={"data_dir": "data/nowhere", "tasks": [*tasks, words]})
    ended = shipped.run("check", file)
    for split in ("test", "train"):
        assert f"openai/gsm8k main {split}: not in " in ended.out, ended
    assert ended.out.count("or let the run fetch it") == 3 and "nothing to do" not in ended.out
    assert "word" in ended.out and ended.code == 0
    specs = shipped.definitions().resolve_all_asset_specs()
    assert ["asked", "raw"] in [[*spec.key.path] for spec in specs]


def test_raw_is_no_rows_to_export(shipped: Project, server: RehearsalServer) -> None:
    spelling = {"name": "SpellingBee", "split": "test", "size": 3}
    file = written(shipped, sources={"tasks": [ARC, spelling]})
    assert shipped.run("run-task", file).code == 0
    refused = shipped.run("export", file, "--stage", "raw")
    told = "raw is files, of which the next stage makes rows; name that one with --stage"
    assert refused.code == 1 and told in refused.err, refused
    assert shipped.run("export", file, "--stage", "chatml").code == 0
    folder = shipped.root / f"data/{shipped.task}/grades_export/chatml"
    assert {len(read_rows(path)) for path in folder.glob("*.jsonl")} == {12, 3}


def test_figures_of_several_partitions_are_those_of_all_items() -> None:
    found = Figures("correct")
    assert found.numbers() == {}
    plain = {
        "name": "correct",
        "is_boolean": True,
        "items": [["A", "x", 2, 1.0, True, 3], ["A", "y", 2, 2.0, True, 1]],
        "baselines": {"A": 0.25},
    }
    one = Figures.of(plain)
    assert one.plain == plain
    numbers = one.numbers()
    assert numbers["items"] == 4 and numbers["accuracy"] == 5 / 8
    assert numbers["accuracy_centred"] == (5 / 8 - 0.25) / 0.75
    assert numbers["pass_at_2"] == 1 and numbers["pass_hat_2"] == 1 / 4
    found.join(one)
    found.join(one)
    assert found.numbers()["items"] == 8 and found.numbers()["accuracy"] == 5 / 8
    assert [row["group"] for row in found.table()] == ["all", "x", "y"]


GSM8K = {"name": "GSM8K", "subset": "main", "split": "test"}
UNFIT = {
    "choice": "the item has no `letters` to choose from",
    "code": "the item lacks a user turn, `test` or `entry_point`: it is no code",
    "mine_that_wants:Capital": "the grader's wanted() raised KeyError: 'capital'",
}
WANTS = """
class Capital:
    fields = {"correct": {"type": "boolean"}}

    def wanted(self, item):
        return item["capital"]

    def score(self, item):
        return {"correct": item["response"] == self.wanted(item)}
"""


@pytest.mark.parametrize("grader", UNFIT)
def test_what_no_answer_could_be_graded_for_is_told_and_not_paid(
    shipped: Project, server: RehearsalServer, grader: str
) -> None:
    (shipped.root / "mine_that_wants.py").write_text(WANTS)
    tasks = [ARC, GSM8K] if grader == "choice" else [GSM8K]  # ARC has letters
    file = written(shipped, sources={"tasks": tasks}, grading={"grader": grader})
    told = f"rows of GSM8K-main-test.jsonl can be answered: {UNFIT[grader]}"
    checked = shipped.run("check", file)
    assert checked.code == 0 and checked.out.count("can be answered") == 1, checked
    assert "asked.yaml:grading: none of the first" in checked.out and told in checked.out
    assert "cannot be asked: " in shipped.run("plan", file).out
    tried = shipped.run("try", file, "--file", "GSM8K*", "--rows", "2")
    assert tried.code == 1 and tried.out.count(f"missing_input: {UNFIT[grader]}") == 2, tried
    assert server.stats()["requests"] == 0
    ended = shipped.run("run-task", file, "--file", "GSM8K*")
    assert ended.code == 1 and UNFIT[grader] in ended.told, ended
    assert server.stats()["requests"] == 0


def test_only_rows_that_can_be_graded_are_paid(shipped: Project, server: RehearsalServer) -> None:
    mixed = {"name": "Mixture", "as": "mixed", "of": [ARC, GSM8K]}
    file = written(shipped, sources={"tasks": [mixed]}, grading={"grader": "choice"})
    file.write_text(file.read_text() + "max_failure_rate: 0.9\n")
    assert shipped.run("run-task", file).code == 0
    rows = grades(shipped)
    asked = [row for row in rows if row["api_status"] == "success"]
    assert {row["task"].partition("/")[0] for row in asked} == {"ARC"}
    assert {row["api_fail_reason"] for row in rows if row not in asked} == {"missing_input"}
    assert 0 < len(asked) == server.stats()["answered"] < len(rows)


def test_conversations_without_a_reference_are_not_paid(
    shipped: Project, server: RehearsalServer
) -> None:
    asked = [{"messages": [{"role": "user", "content": f"{n}?"}]} for n in range(3)]
    write_rows(shipped.root / "data/asked/conversations/talk.jsonl", asked)
    file = written(shipped, grading={"grader": "exact"})
    steps = yaml.safe_load(file.read_text())
    steps["generate_response"]["input_path"] = steps.pop("sources")["output_dir"]
    file.write_text(yaml.safe_dump(steps))
    assert "can be answered: the item has no reference" in shipped.run("check", file).out
    ended = shipped.run("run-task", file)
    assert ended.code == 1 and "the item has no reference" in ended.told, ended
    assert server.stats()["requests"] == 0


OWN = """
from modelcall_assets.sources import Source

class Sums(Source):
    grader = "exact"

    def num_examples(self):
        return 6

    def get_example(self, index):
        if index == 4:
            return {}["no such row"]
        turns = [("user", f"PLUS {index} + {index}?"), ("assistant", str(2 * index))]
        said = [{"role": role, "content": text} for role, text in turns]
        return {"messages": said[:1] if index == 5 else said}

class Length:
    fields = {"length": {"type": "number"}}

    def score(self, item):
        return {"length": None if item["id"].endswith("0") else float(len(item["response"]))}

class Silent:
    fields = {"share": {"type": "number"}, "why": {"type": "string"}}

    def score(self, item):
        return {"why": "none"} if item["id"].endswith("0") else {"share": 0.5}

class Text:
    fields = {"said": {"type": "string"}}

    def score(self, item):
        return {"said": "x"}
"""


def test_conversations_of_sources_are_distilled(shipped: Project, server: RehearsalServer) -> None:
    """Without a grader none needs a reference: what ends with the user's turn is asked as it is."""
    (shipped.root / "mine_for_distillation.py").write_text(OWN)
    shipped.task = "distilled"
    file = shipped.root / "configs/tasks/distilled.yaml"
    sums = {"name": "mine_for_distillation:Sums", "as": "sums"}
    model, prompt = "configs/models/rehearsal.yaml", "configs/prompts/answer_quality_v1.yaml"
    steps: dict[str, Any] = {
        "task_name": "distilled",
        "task_type": "data_distillation",
        "sources": {
            "tasks": [{"name": "SmolTalk", "split": "test"}, sums],
            "data_dir": "demo/benchmarks",
            "output_dir": "data/distilled/conversations",
        },
        "generate_response": {
            "response_config_path": model,
            "output_path": "data/distilled/responses",
        },
        "scores": {
            "model": {"config_path": model},
            "prompt": {"config_path": prompt},
            "output_dir": "data/distilled/scores",
            "prompt_format_key": "answer",
        },
        "max_failure_rate": 0.2,
    }
    file.write_text(yaml.safe_dump(steps))
    assert shipped.run("check", file).code == 0
    ended = shipped.run("run-task", file)
    assert ended.code == 0, ended
    stages = [stage.name for stage in Task(load_task(file, shipped.root)).stages]
    assert stages == ["raw", "chatml", "responses", "scores"]
    talks = read_rows(shipped.root / "data/distilled/responses/SmolTalk-test.jsonl")
    samples = {repr(each["messages"]) for each in SmolTalk("test", folder=ROOT / "demo/benchmarks")}
    assert {repr(row["messages"]) for row in talks} == samples and len(talks) == 12
    for row in talks:
        is_open = row["messages"][-1]["role"] == "user"
        assert row["final_messages"][:-1] == row["messages"][: None if is_open else -1]
        assert row["task"] == "SmolTalk/test" and not {"grader", "baseline"} & row.keys()
    assert sum(row["messages"][-1]["role"] == "user" for row in talks) == 2
    sums_rows = read_rows(shipped.root / "data/distilled/responses/sums.jsonl")
    assert [row["api_status"] for row in sums_rows] == ["success"] * 4 + ["error", "success"]
    assert sums_rows[5]["final_messages"][:-1] == sums_rows[5]["messages"]
    rated = pq.read_table(shipped.root / "data/distilled/scores/SmolTalk-test.parquet").to_pylist()
    assert {row["api_status"] for row in rated} == {"success"}
    both = {**steps, "chatml_conversion": {"dataset_config_path": "x", "input_dir": "y"}}
    both["chatml_conversion"]["output_dir"] = "data/z"
    file.write_text(yaml.safe_dump(both))
    told = "configs/tasks/distilled.yaml:chatml_conversion: not beside sources"
    assert told in shipped.run("check", file).out


def test_sources_and_graders_of_the_users_own(shipped: Project, server: RehearsalServer) -> None:
    module = shipped.root / "mine_for_evaluation.py"
    module.write_text(OWN)
    sources = {"tasks": [{"name": "mine_for_evaluation:Sums", "as": "sums"}]}
    file = written(shipped, sources=sources, grading={"grader": "mine_for_evaluation:Length"})
    file.write_text(file.read_text() + "max_failure_rate: 0.5\n")
    ended = shipped.run("run-task", file)
    assert ended.code == 0, ended
    rows = grades(shipped)
    assert [row["api_status"] for row in rows] == ["success"] * 4 + ["error"] * 2
    assert "row 4" in rows[4]["api_fail_detail"] and "reference" in rows[5]["api_fail_detail"]
    known = [row["length"] for row in rows if row["length"] is not None]
    assert len(known) == 3 and f"length_mean {sum(known) / 3:.4f}" in ended.out
    stage = Task(load_task(file, shipped.root)).stage("chatml")
    before = stage.code_version
    written(shipped, sources=sources, grading={"grader": "mine_for_evaluation:Silent"})
    file.write_text(file.read_text() + "max_failure_rate: 0.9\n")
    ended = shipped.run("run-task", file)
    assert ended.code == 0 and "share_mean 0.5000" in ended.out, ended
    (silent,) = (row for row in grades(shipped) if row["api_fail_reason"] == "scorer_error")
    assert silent["api_fail_detail"] == "score() returned why; expected share, which is averaged"
    written(shipped, sources=sources, grading={"grader": "mine_for_evaluation:Text"})
    refused = shipped.run("run-task", file)
    assert refused.code == 2 and "declares no figure" in refused.err
    assert before == Task(load_task(file, shipped.root)).stage("chatml").code_version


def test_examples_are_no_rows_that_are_asked_under_another_name(shipped: Project) -> None:
    """MMLU has its subjects in `all` too."""
    copy = shipped.root / "data/own/openai/gsm8k"
    shutil.copytree(ROOT / "demo/benchmarks/openai/gsm8k", copy)
    shutil.copy(copy / "main/test.jsonl", copy / "socratic/test.jsonl")
    task = {"name": "GSM8K", "subset": "main", "split": "test"}
    shots = {"few_shot": {"subset": "socratic", "split": "test", "n": 1}}
    file = written(shipped, sources={"data_dir": "data/own", "tasks": [{**task, **shots}]})
    ended = shipped.run("run-task", file)
    assert ended.code == 1 and "is asked too" in ended.told, ended


def test_where_answers_were_rejected_is_told(shipped: Project, server: RehearsalServer) -> None:
    file = written(shipped, sources={"tasks": [ARC]})
    assert "run the task first" in shipped.run("failures", file).err
    server.set_faults(Faults(rate_400=0.5))
    assert shipped.run("run-task", file).code == 1
    ended = shipped.run("failures", file)
    assert "results of responses were rejected: see `--stage responses`" in ended.err, ended
    assert "bad_request" in shipped.run("failures", file, "--stage", "responses").out
