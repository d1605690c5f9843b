"""`modelcall agreement`: judges and people side by side, as many as there are, and how far they
agree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import dagster as dg
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from project import TASK, Project, Row, write_rows

from modelcall_assets.defs.runs import note_overviews
from modelcall_assets.stages.agreement import LEFT_OUT
from modelcall_assets.stages.summary import Summary
from modelcall_assets.transforms.statistics import alpha, kappa

TOM = [1, 2, 3, 3, 2, None, 4, 1]
ANN = [1, 2, 3, 3, 2, 2, 4, 1.0]
EVE = [None, 3, 3, 3, 2, 3, 4, 2]
IDS = [f"q{number}" for number in range(len(TOM))]


def judged(path: Path, ids: Sequence[str] = IDS, **columns: Sequence[Any]) -> Path:
    """A scores file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**columns, "api_record_id": ids}), path)
    return path


def agreed(project: Project, *arguments: str | Path) -> Row:
    ended = project.run("agreement", *arguments, "--json")
    assert ended.code == 0, ended
    return orjson.loads(ended.out)


def told_of(first: Sequence[Any], second: Sequence[Any]) -> dict[str, Any]:
    """What is told of two raters, recounted."""
    both = [pair for pair in zip(first, second, strict=True) if None not in pair]
    return {
        "items": len(both),
        "same": pytest.approx(sum(a == b for a, b in both) / len(both)),
        "kappa": pytest.approx(kappa(Counter(both))),
        "quadratic": pytest.approx(kappa(Counter(both), squared=True)),
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of three judges; Eve's has another order and an item more."""
    turned = [*reversed(IDS), "other"]
    return [
        judged(tmp_path / "tom.parquet", score=TOM),
        judged(tmp_path / "ann.parquet", score=ANN),
        judged(tmp_path / "eve.parquet", turned, score=[*reversed(EVE), 5]),
    ]


class TestJudges:
    def test_each_two_and_all(self, bare: Project, files: list[Path]) -> None:
        told = agreed(bare, *files)
        units = [*zip(TOM, ANN, EVE, strict=True)]
        assert (told["items"], told["scale"]) == (8, "interval")
        assert told["alpha"] == pytest.approx(alpha(Counter(units), "interval"))
        pairs = {(pair.pop("first"), pair.pop("second")): pair for pair in told["pairs"]}
        names = [f"{path}: score" for path in files]
        assert pairs == {
            (names[0], names[1]): told_of(TOM, ANN),
            (names[0], names[2]): told_of(TOM, EVE),
            (names[1], names[2]): told_of(ANN, EVE),
        }

    def test_another_scale(self, bare: Project, files: list[Path]) -> None:
        for scale in ("nominal", "ordinal"):
            found = agreed(bare, *files[:2], "--scale", scale)["alpha"]
            assert found == pytest.approx(alpha(Counter(zip(TOM, ANN, strict=True)), scale))

    def test_columns_of_one_file(self, bare: Project, tmp_path: Path) -> None:
        path = judged(tmp_path / "both.parquet", score=TOM, human=EVE)
        told = agreed(bare, path, "--figure", "score", "--figure", "human")
        assert told["pairs"][0].items() >= told_of(TOM, EVE).items()

    def test_texts_are_nominal(self, bare: Project, tmp_path: Path) -> None:
        one, two = ["a", "b", "a", None, "b"], ["a", "b", "b", "a", "b"]
        path = judged(tmp_path / "both.parquet", IDS[:5], one=one, two=two)
        figures = "--figure", "one", "--figure", "two"
        told = agreed(bare, path, *figures)
        assert told["scale"] == "nominal"
        assert told["alpha"] == pytest.approx(alpha(Counter(zip(one, two, strict=True))))
        assert told["pairs"][0]["quadratic"] is None
        ended = bare.run("agreement", path, *figures, "--scale", "interval")
        assert ended.code == 2 and "--scale: labels are texts; expected nominal" in ended.err

    def test_kappa_is_of_categories(self, bare: Project, tmp_path: Path) -> None:
        ids, values = [str(n) for n in range(101)], [n / 7 for n in range(101)]
        path = judged(tmp_path / "both.parquet", ids, one=values, two=[v + 0.1 for v in values])
        (pair,) = agreed(bare, path, "--figure", "one", "--figure", "two")["pairs"]
        assert (pair["kappa"], pair["quadratic"]) == (None, None)

    def test_folders_join_by_file(self, bare: Project, tmp_path: Path) -> None:
        for judge, first, second in ("one", [1, 2], [2, 2]), ("two", [1, 3], [2, 1]):
            judged(tmp_path / judge / "a.parquet", ["x", "y"], score=first)
            judged(tmp_path / judge / "deep/b.parquet", ["x", "y"], score=second)
        (pair,) = agreed(bare, tmp_path / "one", tmp_path / "two")["pairs"]
        assert pair.items() >= told_of([1, 2, 2, 2], [1, 3, 2, 1]).items()


class TestPeople:
    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_labels_of_a_file(
        self, bare: Project, files: list[Path], tmp_path: Path, suffix: str
    ) -> None:
        path = tmp_path / f"people.{suffix}"
        rows: list[Row] = [{"id": key, "label": label} for key, label in zip(IDS, EVE, strict=True)]
        rows.append({"id": "nobody", "label": 1})
        if suffix == "csv":
            lines = (f"{row['id']},{row['label'] or ''}\n" for row in rows)
            path.write_text("".join(["id,label\n", *lines]))
        else:
            write_rows(path, rows)
        told = agreed(bare, files[0], "--labels", path)
        assert told["pairs"][0].items() >= told_of(TOM, EVE).items()
        assert told["unmatched"] == {str(path): ["nobody"]}
        ended = bare.run("agreement", files[0], "--labels", path)
        assert f"warning: {path}: 1 labels of no such row: nobody" in ended.err
        assert re.search(r"Krippendorff's α \(interval\): 0\.\d{3}, of 6 items", ended.out)

    @pytest.mark.parametrize("names", ["ab", "a"])
    def test_a_label_may_be_of_one_file_and_sample(
        self, bare: Project, tmp_path: Path, names: str
    ) -> None:
        """Of a single file its name does not count."""
        samples, said = [0, 1, 0, 1], [1, 2, 3, 2]
        for name in names:
            path = tmp_path / "judge" / f"{name}.parquet"
            judged(path, ["x", "x", "y", "y"], sample=samples, score=said)
        human = [5, 2, 3, 1]
        rows = [
            {"id": key, "file": "b", "sample": sample, "label": label}
            for key, sample, label in zip("xxyy", samples, human, strict=True)
        ]
        people = write_rows(tmp_path / "people.jsonl", rows)
        told = agreed(bare, tmp_path / "judge", "--figure", "score", "--labels", people)
        assert told["pairs"][0].items() >= told_of(said, human).items()

    @pytest.mark.parametrize("names", ["ab", "a"])
    def test_a_label_of_several_rows_is_refused(
        self, bare: Project, tmp_path: Path, names: str
    ) -> None:
        """Of two files, and of two samples."""
        samples = {"sample": [0, 1]} if names == "a" else {}
        for name in names:
            path = tmp_path / "judge" / f"{name}.parquet"
            judged(path, ["x", "x" if samples else "y"], **samples, score=[1, 2])
        people = write_rows(tmp_path / "people.jsonl", [{"id": "x", "label": 1}])
        ended = bare.run("agreement", tmp_path / "judge", "--figure", "score", "--labels", people)
        fix = "add a column sample, or file, to the labels"
        assert ended.code == 1
        assert f"{people}: a label is of several rows: x; {fix}" in ended.err

    @pytest.mark.parametrize(
        ("rows", "told"),
        [
            ([{"id": "q1", "label": 1}, {"id": "q1", "label": 2}], "two labels for q1"),
            ([{"name": "q1", "label": 1}], "a label without id; expected id or uid"),
            ([{"id": "q1", "score": 1}], "no row has a label; name the column"),
        ],
    )
    def test_what_is_no_file_of_labels(
        self, bare: Project, files: list[Path], tmp_path: Path, rows: list[Row], told: str
    ) -> None:
        people = write_rows(tmp_path / "people.jsonl", rows)
        ended = bare.run("agreement", files[0], "--labels", people)
        assert ended.code == 1 and told in ended.err


def test_one_rater_has_nobody_to_agree_with(bare: Project, files: list[Path]) -> None:
    ended = bare.run("agreement", files[0])
    assert ended.code == 2 and "expected two results, columns or --labels" in ended.err


RULES = """
class Judge:
    fields = {"score": {"type": "integer"}}
    column = "tom"

    def score(self, item):
        return {"score": item[self.column]}

class Ann(Judge):
    column = "ann"
"""
TOMS, ANNS = [1, 2, 3, 3, 2, 4], [1, 2, 3, 2, 2, 1]
HUMANS, PEOPLE = [1, 1, 3, 3, 2, 4], [2, 2, 3, 3]
"""What two judges, a column of the input and a file of labels say of the rows of two files."""


@pytest.fixture
def rated(bare: Project) -> Project:
    """Not run yet: a task whose summary is to tell how far another one and people agree with it."""
    (bare.root / "panel_rules.py").write_text(RULES)
    rows = [
        {"id": f"q{n}", "text": "x", "tom": tom, "ann": ann, "human": human}
        for n, (tom, ann, human) in enumerate(zip(TOMS, ANNS, HUMANS, strict=True))
    ]
    bare.write_input("a.jsonl", rows[:4])
    bare.write_input("b.jsonl", rows[4:])
    own = {"model": None, "prompt": None}
    bare.write_task({**own, "task_name": "ann", "scorer": "panel_rules:Ann"}, file="ann")
    agreement = {"judges": ["configs/tasks/ann.yaml"], "columns": ["human"]}
    agreement["labels"] = {"path": "people.csv", "column": "rating"}
    bare.write_task({**own, "scorer": "panel_rules:Judge", "agreement": agreement})
    labelled(bare, PEOPLE)
    return bare


def labelled(project: Project, said: Sequence[int]) -> None:
    lines = (f"q{n},{label}\n" for n, label in enumerate(said))
    (project.root / "people.csv").write_text("".join(["id,rating\n", *lines]))


def summed(project: Project) -> Any:
    overview = next(each for each in project.steps().overviews if isinstance(each, Summary))
    return overview.summed()[0]


class TestSummary:
    def test_a_panel_is_recounted_and_judges_may_come_later(self, rated: Project) -> None:
        assert rated.run("run-task", TASK).code == 0
        told = summed(rated)
        assert told.tables[LEFT_OUT] == [
            {
                "rater": "agreement.judges[0]",
                "why": "ann: nothing is accepted of scores yet; run the task",
            }
        ]
        assert rated.run("run-task", "configs/tasks/ann.yaml").code == 0
        assert note_overviews(rated.instance, rated.steps()) == ["summary"]
        assert note_overviews(rated.instance, rated.steps()) == []
        told = summed(rated)
        people = [*PEOPLE, None, None]
        said = {"rate: score": TOMS, "rate: human": HUMANS, "ann: score": ANNS}
        said["people.csv"] = people  # type: ignore[assignment]
        found = {(row.pop("rater"), row.pop("and")): row for row in told.tables["agreement"]}
        assert [*found] == [*combinations(said, 2)]
        for (one, other), row in found.items():
            expected = told_of(said[one], said[other])
            assert [*row.values()] == [expected[n] for n in ("items", "same", "kappa", "quadratic")]
        units = Counter(zip(*said.values(), strict=True))
        assert told.numbers["agreement_alpha"] == pytest.approx(alpha(units, "interval"))
        assert told.numbers["agreement_items"] == 6
        assert not told.tables[LEFT_OUT]

    def test_it_is_in_the_ui_and_the_report(self, rated: Project, tmp_path: Path) -> None:
        for task in ("configs/tasks/ann.yaml", TASK):
            ended = rated.run("run-task", task)
            assert ended.code == 0, ended
        wanted = dg.AssetRecordsFilter(rated.asset_key("summary"))
        (record,) = rated.instance.fetch_materializations(wanted, limit=1).records
        assert record.asset_materialization is not None
        metadata = record.asset_materialization.metadata
        shown = {name: value.value for name, value in metadata.items()}
        told = summed(rated)
        assert shown["agreement_alpha"] == told.numbers["agreement_alpha"]
        assert "| rate: human |" in str(shown["agreement"])
        assert f"agreement α {told.numbers['agreement_alpha']:.4f} of 6 items with" in ended.out
        page = tmp_path / "page.html"
        assert rated.run("report", TASK, "--output", page).code == 0
        assert "<h2>Agreement</h2>" in page.read_text()

    def test_other_labels_make_it_due_and_no_score(self, rated: Project) -> None:
        for task in ("configs/tasks/ann.yaml", TASK):
            assert rated.run("run-task", task).code == 0
        before = summed(rated).numbers["agreement_alpha"]
        versions = [stage.code_version for stage in rated.steps().stages]
        labelled(rated, [4, 4, 1, 1])
        assert note_overviews(rated.instance, rated.steps()) == ["summary"]
        assert summed(rated).numbers["agreement_alpha"] < before
        rated.write_task({"model": None, "prompt": None, "scorer": "panel_rules:Judge"})
        assert [stage.code_version for stage in rated.steps().stages] == versions
        assert note_overviews(rated.instance, rated.steps()) == ["summary"]
        assert "agreement_alpha" not in summed(rated).numbers

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"columns": ["humane"]}, "agreement.columns[0]: .* no such column; .*human"),
            ({"judges": ["configs/tasks/no.yaml"]}, r"agreement.judges[0]: .*no.yaml: cannot be"),
            ({"figure": "points", "columns": ["tom"]}, "agreement.figure: .* no such column"),
            ({"labels": {"path": "gone.csv"}}, "agreement.labels: /.*gone.csv: not found"),
            ({"labels": {"path": "people.csv"}}, "agreement.labels: .* no row has a label"),
            ({"labels": {"path": "texts.csv"}, "scale": "ordinal"}, "agreement.scale: .* texts"),
            ({"panel": []}, "agreement.panel: unknown key"),
        ],
    )
    def test_check_names_mistakes_and_the_summary_goes_on(
        self, rated: Project, changes: Row, told: str
    ) -> None:
        assert rated.run("run-task", TASK).code == 0
        (rated.root / "texts.csv").write_text("id,label\nq1,good\n")
        own = {"model": None, "prompt": None, "scorer": "panel_rules:Judge"}
        rated.write_task({**own, "agreement": changes})
        ended = rated.run("check", TASK)
        pattern = told.replace("[0]", r"\[0\]")
        assert ended.code == 1 and re.search(f"rate.yaml:{pattern}", ended.out), ended
        if "panel" not in changes:
            assert rated.run("run-task", TASK).code == 0
            assert summed(rated).tables[LEFT_OUT]

    def test_a_task_that_rates_nothing(self, bare: Project) -> None:
        bare.write_generation(agreement={"columns": ["human"]})
        ended = bare.run("check", TASK)
        assert "rate.yaml:agreement: not used: the task rates nothing" in ended.out
