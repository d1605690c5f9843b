"""Scorers of the user's own: through the graph, the command line, and with all they may return."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import orjson
import pyarrow.parquet as pq
import pytest
from dagster._core.definitions.data_version import StaleStatus
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT, write_examples
from project import FRESH, PREPROCESS, QUIET, STALE, TASK, A, Project, Row, read_rows

from modelcall_assets.defs.instance import register
from modelcall_assets.errors import RunStopped, SetupError
from modelcall_assets.records.outcome import Failure, Reason, Success
from modelcall_assets.rehearsal import RehearsalServer
from modelcall_assets.stages.report import Tally
from modelcall_assets.transforms.user_code import SharedTypes, fitted, grade, load_scorer, plain

ROWS: list[dict[str, Any]] = [
    {"id": "one", "text": "short"},
    {"id": "two", "text": "somewhat longer", "tags": ["x"]},
    {"id": "three", "text": ""},
]
LENGTHS = """
class Lengths:
    def score(self, item):
        return {"length": len(item["text"]), "is_long": len(item["text"]) > 10}
"""


WAITING = """
import threading

three = threading.Barrier(3, timeout=30)

class Waiting:
    concurrency = 3

    def score(self, item):
        three.wait()
        return {"length": len(item["text"])}
"""


class Rules(Project):
    """Its task rates with a scorer: no model, no prompt, no endpoint."""

    def write(
        self,
        source: str,
        scorer: str = "my_rules:Lengths",
        rows: Sequence[Mapping[str, Any] | bytes] = ROWS,
        **task: Any,
    ) -> Path:
        """The scorer's module, the task that names it, and one input file."""
        path = self.root / (scorer.partition(":")[0].replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        self.write_task({"model": None, "prompt": None, "scorer": scorer, **task})
        self.write_input(A, rows)
        return path

    def rate(self) -> list[Row]:
        """The rows of a run that must go well."""
        assert self.materialize().failed == []
        return self.scores(A)

    def types(self) -> dict[str, str]:
        """Types of the columns that come from the scorer."""
        schema = pq.read_schema(self.output(A))
        own = schema.names[: schema.names.index("api_record_id")]
        return {n: str(schema.field(n).type) for n in own if n not in ("id", "text", "tags")}


@pytest.fixture
def rules(
    bare: Project, server: RehearsalServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rules]:
    """Whatever a test does, no request may have been sent."""
    monkeypatch.delenv("REHEARSAL_BASE_URL")
    for folder in ("configs/models", "configs/prompts"):
        shutil.rmtree(bare.root / folder)
    with closing(Rules(bare.root)) as made:
        yield made
        made.forget()
    assert server.stats()["requests"] == 0


def statuses(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    return [(row["api_status"], row["api_fail_reason"]) for row in rows]


class TestThroughTheGraph:
    def test_a_scorer_that_says_so_rates_several_rows_at_once_in_order(self, rules: Rules) -> None:
        rules.write(WAITING, "my_pkg.rules:Waiting")
        assert rules.run("run-task", TASK).code == 0
        assert [(row["id"], row["length"]) for row in rules.scores(A)] == [
            ("one", 5),
            ("two", 15),
            ("three", 0),
        ]

    def test_the_command_line_rates_with_no_endpoint(self, rules: Rules) -> None:
        rules.write(LENGTHS, "my_pkg.rules:Lengths")
        ended = rules.run("run-task", TASK)
        assert ended.code == 0, ended
        assert "1 of 1 file scored: 3 rows, 3 succeeded, 0 failed" in ended.out
        assert "ratings by my_pkg.rules:Lengths" in ended.out and "no model was asked" in ended.out
        rows = rules.scores(A)
        assert [(row["id"], row["length"], row["is_long"]) for row in rows] == [
            ("one", 5, False),
            ("two", 15, True),
            ("three", 0, False),
        ]
        assert rules.types() == {"length": "int64", "is_long": "bool"}
        assert {row["api_model"] for row in rows} == {"my_pkg.rules:Lengths"}
        assert {row["api_prompt"] for row in rows} == {None}
        assert orjson.loads(rows[1]["api_return"]) == {"length": 15, "is_long": True}

        again = rules.run("run-task", TASK)
        assert (again.code, "nothing to do" in again.out) == (0, True)
        path = rules.root / "my_pkg/rules.py"
        path.write_text(LENGTHS.replace("> 10", "> 1000"))
        edited = rules.run("run-task", TASK)
        assert edited.code == 0 and "ratings by" in edited.out
        assert [row["is_long"] for row in rules.scores(A)] == [False] * 3

    @pytest.mark.parametrize(
        ("source", "scorer"),
        [
            (LENGTHS, "in_the_root:Lengths"),
            (LENGTHS + "\nmine = Lengths()\n", "a_pkg.inner.rules:mine"),
        ],
        ids=["a class in the root", "an instance in a package"],
    )
    def test_a_class_or_an_instance(self, rules: Rules, source: str, scorer: str) -> None:
        rules.write(source, scorer)
        assert [row["length"] for row in rules.rate()] == [5, 15, 0]

    def test_how_the_asset_looks(self, rules: Rules) -> None:
        rules.write(LENGTHS)
        graph = rules.definitions().get_repository_def().asset_graph
        node = graph.get(dg.AssetKey(["rate", "scores"]))
        assert sorted(node.kinds) == ["parquet", "python"]
        assert not node.pools
        assert "ratings by my_rules:Lengths" in (node.description or "")
        assert [check.name for check in node.check_keys] == ["complete"]

    @pytest.mark.parametrize("fresh", [True, False])
    def test_the_ui_may_ask_for_fresh(self, rules: Rules, fresh: bool) -> None:
        rules.write(LENGTHS)
        register(rules.instance, rules.steps())
        result = (
            rules.definitions()
            .resolve_implicit_global_asset_job_def()
            .execute_in_process(
                instance=rules.instance,
                partition_key=A,
                run_config={**QUIET, "ops": {"rate__scores": {"config": {"fresh": fresh}}}},
            )
        )
        assert result.success
        assert len(rules.scores(A)) == 3
        assert rules.materialize().ran == {"raw": 0, "scores": 0}
        assert rules.materialize(fresh=True).ran == {"raw": 0, "scores": 1}

    def test_an_edited_scorer_makes_its_scores_stale_and_nothing_else(self, rules: Rules) -> None:
        def stale(stage: str) -> StaleStatus:
            return rules.staleness(stage)[A]

        path = rules.write(LENGTHS)
        rules.rate()
        assert (stale("raw"), stale("scores")) == (FRESH, FRESH)
        path.write_text(LENGTHS.replace("> 10", "> 1000"))
        assert stale("scores") == FRESH, "this process has the old code and says so"
        rules.forget()
        assert (stale("raw"), stale("scores")) == (FRESH, STALE)
        assert [row["is_long"] for row in rules.rate()] == [False] * 3
        assert stale("scores") == FRESH

    def test_after_preprocessing_the_scorer_sees_its_rows(self, rules: Rules) -> None:
        source = """
class Lengths:
    def score(self, item):
        return {"seen": item["content_truncate_8k"], "has_error_column": "oops" in item}
"""
        steps = {**PREPROCESS, "filters": {"min_text_length": 6}}
        rows = [*ROWS, b"{torn", {"id": "five", "text": 7}, {"id": "six", "text": "the last one"}]
        rules.write(source, rows=rows, preprocess=steps, max_failure_rate=1)
        rated = rules.rate()
        assert [row["seen"] for row in rated] == ["somewhat longer", None, None, "the last one"]
        assert [reason for _, reason in statuses(rated)] == [
            None,
            "bad_line",
            "preprocess_error",
            None,
        ]
        assert "the text is not a string" in rated[2]["api_fail_detail"]

    def test_bad_lines_stay_in_their_place_and_are_not_shown_to_the_scorer(
        self, rules: Rules
    ) -> None:
        rows = [ROWS[0], b'{"id": "torn', ROWS[1], b"[]", b"", ROWS[2]]
        rules.write(LENGTHS, rows=rows, max_failure_rate=0.4)
        rated = rules.rate()
        assert [row["id"] for row in rated] == ["one", None, "two", None, "three"]
        assert statuses(rated)[1] == statuses(rated)[3] == ("error", "bad_line")
        assert "line 2, column 13" in rated[1]["api_fail_detail"]
        assert [row["length"] for row in rated] == [5, None, 15, None, 0]

    def test_a_stopped_run_publishes_nothing(self, rules: Rules) -> None:
        rules.write(LENGTHS)
        rules.rate()
        rules.output(A).unlink()
        tally = Tally()
        tally.stop()
        with pytest.raises(RunStopped, match="rated from its first row again"):
            rules.steps().stage("scores").make(A, tally)
        assert not rules.output(A).exists()


class TestMistakesInScorers:
    def test_an_exception_fails_its_row_with_the_users_file_and_line(self, rules: Rules) -> None:
        source = """
def strict(text):
    if not text:
        raise ValueError("nothing to rate \\ud800")
    return len(text)

class Lengths:
    def score(self, item):
        return {"length": strict(item["text"])}
"""
        path = rules.write(source, max_failure_rate=0.5)
        rows = rules.rate()
        assert statuses(rows) == [("success", None)] * 2 + [("error", "scorer_error")]
        detail = rows[2]["api_fail_detail"]
        assert f'File "{path}", line 4, in strict' in detail
        assert "ValueError: nothing to rate" in detail
        assert rows[2]["length"] is None and rows[2]["api_return"] is None

    def test_too_many_of_them_are_red_and_lie_aside(self, rules: Rules) -> None:
        rules.write(
            "class Lengths:\n    def score(self, item):\n        return 1 / len(item)**0 / 0"
        )
        (message,) = rules.materialize().failed
        assert "3 of 3 rows failed (100.00%), more than max_failure_rate 5.00%" in message
        assert "scorer_error 3. The first: ZeroDivisionError: " in message
        assert (
            "(record one, row 1)" in message
            and "run the task again to rate them all again" in message
        )
        aside = read_rows(rules.rejected(A))
        assert statuses(aside) == [("error", "scorer_error")] * 3
        assert rules.manifest(A) is None
        assert not rules.output(A).exists()

    def test_what_a_scorer_does_to_its_row_reaches_nobody(self, rules: Rules) -> None:
        source = """
class Lengths:
    def score(self, item):
        item["tags"] = (item.get("tags") or []) + ["changed"]
        (item.get("nested") or {}).clear()
        item.pop("text")
        item["id"] = "mine"
        return item
"""
        rows = [{**row, "nested": {"k": 1}} for row in ROWS]
        rules.write(source, rows=rows)
        rated = rules.rate()
        assert [row["input_id"] for row in rated] == ["one", "two", "three"]
        assert [row["text"] for row in rated] == [row["text"] for row in ROWS]
        assert [row["input_nested"] for row in rated] == [{"k": 1}] * 3
        assert [row["api_record_id"] for row in rated] == ["one", "two", "three"]
        assert rated[1]["tags"] == ["x", "changed"] and rated[1]["input_tags"] == ["x"]

    @pytest.mark.parametrize(
        ("body", "detail"),
        [
            ("return None", "score() returned NoneType; expected a dict"),
            ("return [1]", "score() returned list; expected a dict"),
            ("return {'api_status': 'fine'}", "api_status: names that start with api_ are columns"),
            ("return {'score': 'high'}", "score is 'high', not of the declared type integer"),
            ("return {'score': True}", "score is True, not of the declared type integer"),
            ("return {'tags': [1]}", "tags[] is 1, not of the declared type string"),
            ("return {'tags': 'a'}", "tags is 'a', not of the declared type array"),
            ("import sys; sys.exit(3)", "SystemExit: 3"),
            ("return self.score(item)", "RecursionError"),
            ("x = {}; x['x'] = x; return x", "nested deeper than 100 levels"),
        ],
    )
    def test_what_is_that_rows_failure(self, body: str, detail: str) -> None:
        scope: dict[str, Any] = {}
        exec(f"class Mine:\n    def score(self, item):\n        {body}\n", scope)
        mine = scope["Mine"]()
        mine.fields = {
            "score": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        }
        outcome = grade(mine, {"text": "x"})
        assert isinstance(outcome, Failure) and outcome.reason == Reason.SCORER_ERROR
        assert detail in outcome.detail


class TestColumns:
    def test_types_come_from_the_values(self, rules: Rules) -> None:
        source = """
class Lengths:
    def score(self, item):
        n = len(item["text"])
        return {
            "whole": n, "share": n / 2 if n else 0, "words": item["text"].split(),
            "mixed": n if n else "none", "nested": {"n": n}, "never": None,
            "wide": 2**60 + 1 if n else 0.5, "sometimes" if n else "else": True,
        }
"""
        rules.write(source)
        rows = rules.rate()
        assert rules.types() == {
            "whole": "int64",
            "share": "double",
            "words": "list<element: string>",
            "mixed": "string",
            "nested": "string",
            "never": "string",
            "wide": "string",
            "sometimes": "bool",
            "else": "bool",
        }
        assert [row["mixed"] for row in rows] == ["5", "15", '"none"']
        assert [row["nested"] for row in rows] == ['{"n":5}', '{"n":15}', '{"n":0}']
        assert [row["wide"] for row in rows] == [str(2**60 + 1)] * 2 + ["0.5"]
        assert [row["sometimes"] for row in rows] == [True, True, None]

    def test_types_that_the_scorer_declares(self, rules: Rules) -> None:
        source = """
class Lengths:
    fields = {"length": {"type": "number"}, "label": {"type": "string"}, "why": {}}
    def score(self, item):
        return {"length": 2**60 + len(item["text"]), "why": ["long"], "undeclared": 1}
"""
        rules.write(source)
        rows = rules.rate()
        assert rules.types() == {"length": "double", "label": "string", "why": "string"}
        assert rows[0]["length"] == float(2**60) and rows[0]["label"] is None
        assert rows[0]["why"] == '["long"]'
        assert orjson.loads(rows[0]["api_return"])["undeclared"] == 1

    def test_values_that_json_or_a_column_cannot_hold_do_no_harm(self, rules: Rules) -> None:
        source = """
from datetime import datetime
from decimal import Decimal
import pyarrow as pa

class Odd:
    def __repr__(self):
        return "odd"

class Lengths:
    def score(self, item):
        n = len(item["text"])
        return {
            "nan": [float("nan"), float("inf"), 1.5][n % 3], "huge": 10**30,
            "huge_or_not": 10**30 if n else 1, "when": datetime(2024, 5, 6),
            "torn": "a\\udc80b", "set": {"b", "a"}, "odd": Odd(), "exact": Decimal("1.10"),
            "bytes": b"x", "torn_keys": {"\\udc80": "\\ud800", 5: [float("nan")]}, 7: 7,
        }
"""
        rules.write(source)
        rows = rules.rate()
        first = rows[0]
        assert statuses(rows) == [("success", None)] * 3
        assert first["huge"] == str(10**30) and first["when"] == "2024-05-06 00:00:00"
        assert first["torn"] == "a\\udc80b" and first["set"] == ["a", "b"]
        assert first["odd"] == "odd" and first["exact"] == "1.10" and first["bytes"] == "b'x'"
        assert orjson.loads(first["torn_keys"]) == {"\\udc80": "\\ud800", "5": [None]}
        assert [str(row["nan"]) for row in rows] == ["1.5", "nan", "nan"]
        assert first["7"] == 7
        before = rules.output(A).read_bytes()
        rules.materialize(fresh=True)
        assert rules.output(A).read_bytes() == before, "the same, run after run"

    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(st.characters())
            | st.datetimes()
            | st.decimals()
            | st.binary(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
            max_leaves=8,
        )
    )
    def test_whatever_is_returned_can_be_written(self, value: Any) -> None:
        made = plain(value)
        orjson.dumps(made)
        assert plain(made) == made or "nan" in repr(made)

    def test_numpy_values_are_plain_ones(self) -> None:
        class Numpy:
            """What numpy's scalars and arrays have in common."""

            dtype = "any"

            def __init__(self, value: Any) -> None:
                self.tolist = lambda: value

        made = plain({"f": Numpy(0.5), "i": Numpy(3), "a": Numpy([[1], [2]])})
        assert made == {"f": 0.5, "i": 3, "a": [[1], [2]]}
        types = SharedTypes()
        types.note(made)
        assert types.fields() == {"f": {"type": "number"}, "i": {"type": "integer"}, "a": {}}

    def test_declared_types_are_no_json_schema(self) -> None:
        """A list of types, or one without a column of its own, is JSON text: anything fits."""
        fields = {"any": {"type": ["integer", "null"]}, "object": {"type": "object"}}
        assert fitted({"any": "x", "object": 3}, fields) == {"any": "x", "object": 3}

    def test_rows_are_given_as_they_are(self) -> None:
        class Mine:
            def score(self, item: dict[str, Any]) -> dict[str, Any]:
                return {"same": item is row, "names": list(item)}

        row = {"id": 1, "text": "x"}
        assert grade(Mine(), row) == Success({"same": False, "names": ["id", "text"]})


BROKEN = {
    "no colon": ("my_rules", LENGTHS, "'my_rules' names no object; expected module:name"),
    "no name": ("my_rules:", LENGTHS, "names no object"),
    "no module": ("no_such.rules:Mine", None, "import no_such.rules raised ModuleNotFoundError"),
    "nothing of that name": ("my_rules:Missing", LENGTHS, "my_rules has nothing called Missing"),
    "no method": ("my_rules:f", "def f(item): ...", "my_rules:f has no method score(item) -> dict"),
    "syntax": ("my_rules:F", "class F:\n  def score(self", "raised SyntaxError: "),
    "raises": ("my_rules:F", "import os\nx = os.nothing_such\n", "my_rules.py, line 2)"),
    "exits": ("my_rules:F", "import sys\nsys.exit('bye')\n", "raised SystemExit: bye"),
}
NOT_MADE = {
    "arguments": (
        "my_rules:F",
        "class F:\n  def __init__(self, n): ...\n  def score(self, item): ...",
        "my_rules:F() raised TypeError",
    ),
    "fields of no types": (
        "my_rules:F",
        "class F:\n  fields = ['a']\n  def score(self, item): ...",
        "my_rules:F.fields declares no types; expected a mapping such as",
    ),
    "a column of ours": (
        "my_rules:F",
        "class F:\n  fields = {'api_x': {}}\n  def score(self, item): ...",
        "my_rules:F.fields: api_x: names that start with api_ are columns",
    ),
}


class TestBrokenReferences:
    @pytest.mark.parametrize(
        ("scorer", "source", "wrong"), (BROKEN | NOT_MADE).values(), ids=BROKEN | NOT_MADE
    )
    def test_each_names_the_task_file_and_its_field(
        self, rules: Rules, scorer: str, source: str | None, wrong: str
    ) -> None:
        if source is not None:
            (rules.root / "my_rules.py").write_text(source)
        with pytest.raises(SetupError) as caught:
            load_scorer(scorer, rules.root, TASK)
        assert str(caught.value).startswith(f"{TASK}:scorer: ")
        assert wrong in str(caught.value)

    @pytest.mark.parametrize("name", BROKEN)
    def test_in_the_graph_it_is_a_stub_and_others_load(self, rules: Rules, name: str) -> None:
        scorer, source, wrong = BROKEN[name]
        rules.write(LENGTHS, "good_rules:Lengths")
        if source is not None:
            (rules.root / "my_rules.py").write_text(source)
        other = {"model": None, "prompt": None, "scorer": scorer, "task_name": "other"}
        rules.write_task(other, file="other")
        defs = rules.definitions()
        dg.Definitions.validate_loadable(defs)
        specs = {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}
        assert set(specs) == {"rate/raw", "rate/scores", "rate/summary", "broken_configs/other"}
        description = specs["broken_configs/other"].description or ""
        assert "configs/tasks/other.yaml:scorer: " in description and wrong in description

    def test_check_and_run_task_tell_it_and_run_nothing(self, rules: Rules) -> None:
        scorer, source, wrong = NOT_MADE["arguments"]
        rules.write(source, scorer)
        for command in (["check"], ["run-task", TASK]):
            ended = rules.run(*command)
            assert ended.code == (1 if command == ["check"] else 2)
            told = ended.told
            assert f"error: {TASK}:scorer: {wrong}" in told
        assert not rules.output(A).exists()

    @pytest.mark.parametrize("also", ["model", "prompt"])
    def test_a_scorer_beside_a_model_or_prompt_is_refused(self, rules: Rules, also: str) -> None:
        rules.write(LENGTHS, **{also: {"config_path": "configs/x.yaml"}})
        with pytest.raises(SetupError) as caught:
            rules.steps()
        assert f"{TASK}:{also}: not used: the task has a scorer" in str(caught.value)


class TestBeforehand:
    def test_plan_counts_rows_and_says_that_no_model_is_asked(self, rules: Rules) -> None:
        rules.write(LENGTHS)
        ended = rules.run("plan", TASK)
        assert ended.code == 0, ended
        assert "to send: nothing; ratings by my_rules:Lengths" in ended.out
        assert "a.jsonl │ new │    3" in ended.out
        assert "tokens" not in ended.out and "cost" not in ended.out

    def test_try_shows_the_row_and_its_result_and_leaves_nothing(self, rules: Rules) -> None:
        source = LENGTHS.replace('len(item["text"]) > 10', '1 / len(item["text"])')
        rules.write(source, rows=[ROWS[0], b"{torn", ROWS[2]])
        project = rules
        process = project.start("try", TASK)  # a traceback in the output is meant here
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        one, torn, three = out.split("── row ")[1:]
        assert '"text": "short"' in one and '"length": 5,\n  "is_long": 0.2' in one
        assert "error: bad_line: line 2" in torn and "row:" not in torn
        assert "error: scorer_error: Traceback" in three and "ZeroDivisionError" in three
        assert not project.output(A).exists() and not (project.root / "data/rate").exists()
        (project.root / "model.yaml").write_text("{}")
        refused = project.run("try", TASK, "--model", "model.yaml")
        assert refused.code == 2
        assert "Error: --model: the task has a scorer" in refused.err

    def test_check_passes_and_rates_nothing(self, rules: Rules) -> None:
        rules.write(LENGTHS.replace("return", "open('rated', 'w').close(); return"))
        ended = rules.run("check", "--strict")
        assert ended.code == 0 and "0 errors, 0 warnings" in ended.out
        assert not (rules.root / "rated").exists()


class TestThePage:
    def test_its_example_runs(self, rules: Rules) -> None:
        assert len(write_examples(ROOT / "docs/scorers.md", rules.root)) == 2
        rules.task, rules.inputs = "comments", "data/my_corpus"
        rules.write_input(A, [{"id": 1, "text": "x = 1  # one\n\ny = 2\n"}, {"id": 2}])
        (message,) = rules.materialize().failed
        assert "scorer_error 1. The first: KeyError: 'text' (record 2, row 2)" in message
        path = rules.rejected(A)
        first = read_rows(path)[0]
        assert (first["comment_share"], first["verdict"]) == (0.5, "fine")
        assert str(pq.read_schema(path).field("comment_share").type) == "double"
