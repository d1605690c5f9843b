"""`modelcall compare`: rows of two results joined, their figures recounted, and what is told."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from project import PREPROCESS, TASK, B, Project, Row, some_rows

from modelcall_assets.errors import SetupError
from modelcall_assets.stages.compare import Comparison, compare
from modelcall_assets.stages.ratings import copied_ratings
from modelcall_assets.transforms.statistics import Estimate, mcnemar, mean, proportion, share

ONE, TWO = "configs/tasks/one.yaml", "configs/tasks/two.yaml"
RULES = """
class Grader:
    kinds = {"note": "string", "right": "boolean", "points": "number"}
    fields = {name: {"type": kind} for name, kind in kinds.items()}
    whose = "by_one"

    def score(self, item):
        right, points = item[self.whose]
        if points == "broken":
            raise ValueError("no points")
        note = f"{self.whose} on {item['id']}"
        return {"note": note, "right": right, "points": points}

class Second(Grader):
    whose = "by_two"
"""
ROWS: dict[str, list[Row]] = {
    "a.jsonl": [
        {"id": "a1", "easy": True, "subject": "law", "by_one": [True, 3], "by_two": [False, 1]},
        {"id": "a2", "easy": True, "subject": "law", "by_one": [True, 2], "by_two": [True, 2.5]},
        {"id": "a3", "easy": True, "subject": "art", "by_one": [False, 0], "by_two": [True, 5]},
        {"id": "a4", "easy": True, "subject": "art", "by_one": [False, 1], "by_two": [True, 4]},
    ],
    "deep/b.jsonl": [
        {"id": "a1", "easy": False, "subject": "art", "by_one": [True, 4], "by_two": [True, 4]},
        {"id": "b2", "easy": False, "subject": "law", "by_one": [None, 1], "by_two": [True, 1]},
        {"id": "b3", "easy": False, "subject": "law", "by_one": [True, 1], "by_two": [0, "broken"]},
    ],
}
PAIRS = {  # right by both, of the rows in which both have a value
    "law": [(True, False), (True, True)],
    "art": [(False, True), (False, True), (True, True)],
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[Project]:
    """Only to be read: the same rows rated by two graders, in two tasks."""
    made = Project(tmp_path_factory.mktemp("graded") / "project")
    home = shutil.copytree(empty_home, made.root / "dagster_home")
    (made.root / "rules.py").write_text(RULES)
    for name, rows in ROWS.items():
        made.write_input(name, rows)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DAGSTER_HOME", str(home))
        for task, scorer in ("one", "Grader"), ("two", "Second"):
            own = {"task_name": task, "scorer": f"rules:{scorer}", "max_failure_rate": 1}
            made.write_task({"model": None, "prompt": None, **own}, file=task)
            ended = made.run("run-task", f"configs/tasks/{task}.yaml")
            assert ended.code == 0, ended
        yield made
        made.close()


def compared(project: Project, *arguments: str | Path) -> Row:
    ended = project.run("compare", *arguments, "--json")
    assert ended.code == 0, ended
    return orjson.loads(ended.out)


def paired_difference(
    one: Sequence[float], two: Sequence[float], clusters: Sequence[Any] | None = None
) -> Estimate:
    """Of the second and the first."""
    return mean([b - a for a, b in zip(one, two, strict=True)], clusters)


def plain(estimate: Sequence[float]) -> Row:
    return dict(zip(("value", "low", "high", "n"), estimate, strict=True))


class TestTasks:
    def test_right_and_wrong_of_each_group_and_in_all(self, graded: Project) -> None:
        told = compared(graded, ONE, TWO, "--by", "subject")
        assert (told["figure"], told["cluster"]) == ("right", None)
        groups = {"all": [*PAIRS["law"], *PAIRS["art"]], "art": PAIRS["art"], "law": PAIRS["law"]}
        assert [each["of"] for each in told["figures"]] == [*groups]
        for each, pairs in zip(told["figures"], groups.values(), strict=True):
            one, two = zip(*pairs, strict=True)
            assert each["a"] == plain(proportion(sum(one), len(one)))
            assert each["b"] == plain(proportion(sum(two), len(two)))
            difference = paired_difference(one, two).within(-1, 1)
            assert each["difference"] == pytest.approx(plain(difference))
            lost, gained = pairs.count((True, False)), pairs.count((False, True))
            assert (each["fell"], each["rose"]) == (lost, gained)
            assert each["mcnemar"] == mcnemar(lost, gained)._asdict()

    def test_rows_without_a_value_are_counted_on_their_side(self, graded: Project) -> None:
        missing = compared(graded, ONE, TWO)["missing"]
        assert missing["a"] == {"rows": 0, "examples": [], "unrated": 1}
        assert missing["b"] == {"rows": 0, "examples": [], "unrated": 1}
        assert compared(graded, ONE, TWO, "--figure", "points")["missing"]["a"]["unrated"] == 0

    def test_numbers_and_the_rows_that_differ_most(self, graded: Project) -> None:
        told = compared(graded, ONE, TWO, "--figure", "points", "--show", "3")
        points = [(3, 1), (2, 2.5), (0, 5), (1, 4), (4, 4), (1, 1)]
        one, two = zip(*points, strict=True)
        (figures,) = told["figures"]
        assert figures["a"] == pytest.approx(plain(mean(one)))
        assert figures["difference"] == pytest.approx(plain(paired_difference(one, two)))
        assert (figures["mcnemar"], figures["fell"], figures["rose"]) == (None, 1, 3)
        assert [(each["id"], each["a"], each["b"]) for each in told["shown"]] == [
            ("a3", 0, 5),
            ("a4", 1, 4),
            ("a1", 3, 1),
        ]
        assert [each["row"] for each in told["shown"]] == [3, 4, 1]
        assert orjson.loads(told["shown"][0]["replies"]["b"])["note"] == "by_two on a3"

    @pytest.mark.parametrize(
        ("by", "clusters"), [("file", [1, 1, 1, 1, 2]), ("subject", [1, 1, 2, 2, 2])]
    )
    def test_clusters_widen_intervals_and_take_the_test_away(
        self, graded: Project, by: str, clusters: list[int]
    ) -> None:
        told = compared(graded, ONE, TWO, "--cluster", by)
        one = [True, True, False, False, True]
        two = [False, True, True, True, True]
        (figures,) = told["figures"]
        assert told["cluster"] == by
        assert figures["b"] == pytest.approx(plain(share(two, clusters)))
        difference = paired_difference(one, two, clusters).within(-1, 1)
        assert figures["difference"] == pytest.approx(plain(difference))
        assert figures["mcnemar"] is None

    def test_a_single_cluster_says_nothing_of_the_interval(self, graded: Project) -> None:
        told = compared(graded, ONE, TWO, "--by", "subject", "--cluster", "subject")
        art = told["figures"][1]["difference"]
        assert art == {"value": 2 / 3, "low": -1, "high": 1, "n": 3}, "all that booleans can be"
        options = "--figure", "points", "--by", "subject", "--cluster", "subject"
        art = compared(graded, ONE, TWO, *options)["figures"][1]["difference"]
        assert (art["low"], art["high"]) == (None, None)

    def test_people_get_a_table_and_both_replies_side_by_side(self, graded: Project) -> None:
        ended = graded.run("compare", ONE, TWO, "--by", "subject", "--show", "1")
        assert ended.code == 0, ended
        assert "right of the rows that both have, with 95 % intervals\n" in ended.out
        assert "A has 0 rows that the other has not; 1 without a value\n" in ended.out
        assert "right → wrong" in ended.out and "McNemar's p" in ended.out
        (line,) = re.findall(r"^│ law .*$", ended.out, re.MULTILINE)
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1] == "2" and cells[2].startswith("1 [") and cells[-2:] == ["1", "0"]
        (line,) = re.findall(r"^│ a1 .*$", ended.out, re.MULTILINE)
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert (cells[1], cells[3]) == ("yes", "no")
        assert "by_one on a1" in cells[2] and "by_two on a1" in cells[4]

    def test_no_word_is_cut_where_the_terminal_is_narrow(self, graded: Project) -> None:
        ended = graded.run("compare", ONE, TWO, "--by", "subject", columns=80)
        assert ended.code == 0 and "…" not in ended.out, ended
        told = compared(graded, ONE, TWO)["figures"][0]["difference"]
        interval = f"{told['value']:.4g} [{told['low']:.4g}, {told['high']:.4g}]"
        assert {*interval.split()} <= {*ended.out.split()}
        assert max(map(len, ended.out.splitlines())) <= 80

    def test_the_page_has_the_figures_and_the_rows_that_differ(
        self, graded: Project, tmp_path: Path
    ) -> None:
        path = tmp_path / "both.html"
        arguments = "compare", ONE, TWO, "--by", "subject", "--page", path
        ended = graded.run(*arguments)
        assert ended.code == 0 and f"3 of 3 rows that differ: {path}" in ended.out, ended
        text = path.read_text()
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
        assert found is not None
        data = orjson.loads(found[1])
        assert [(each["id"], each["reason"]) for each in data["records"]] == [
            ("a1", "right → wrong"),
            ("a3", "wrong → right"),
            ("a4", "wrong → right"),
        ]
        assert [each["is_good"] for each in data["records"]] == [False, True, True]
        values = data["records"][0]["values"]
        assert (values["right A"], values["right B"]) == (True, False)
        said = {turn["role"]: turn["parts"][0]["text"] for turn in data["records"][0]["turns"]}
        assert "by_one on a1" in data["texts"][said["A: True"]]
        assert "by_two on a1" in data["texts"][said["B: False"]]
        assert "<td>law</td>" in text and "<figure>" in text
        again = graded.run(*arguments)
        assert again.code == 2 and "--page: " in again.err and "is there already" in again.err
        assert graded.run(*arguments, "--force").code == 0

    def test_a_result_that_was_changed_is_refused(self, graded: Project) -> None:
        path = graded.root / "data/two/scores/a.parquet"
        before = path.read_bytes()
        pq.write_table(pq.read_table(path).slice(0, 2), path)
        try:
            ended = graded.run("compare", ONE, TWO)
        finally:
            path.write_bytes(before)
        assert ended.code == 1 and "not what scores published" in ended.err


def test_two_prompts_of_a_judge(bare: Project) -> None:
    """An answer's first number, of files that are preprocessed or not."""
    bare.write_input(B, some_rows(12))
    bare.write_prompt(
        {"prompt_template": {"prompt_text": "Look hard at this: {text}"}}, file="hard"
    )
    hard = {"config_path": "configs/prompts/hard.yaml"}
    bare.write_task({"task_name": "hard", "prompt": hard, "preprocess": PREPROCESS}, file="hard")
    for task in (TASK, "configs/tasks/hard.yaml"):
        ended = bare.run("run-task", task)
        assert ended.code == 0, ended
    told = compared(bare, TASK, "configs/tasks/hard.yaml")
    assert (told["figure"], told["missing"]["a"]["rows"]) == ("score", 0)
    (figures,) = told["figures"]
    one = [row["score"] for row in bare.scores(B)]
    two = [row["score"] for row in Project(bare.root, task="hard").scores(B)]
    assert figures["difference"] == pytest.approx(plain(paired_difference(one, two)))
    assert figures["mcnemar"] is None and figures["a"]["n"] == 12


class TestCopies:
    def test_an_older_copy_beside_the_task(self, graded: Project, tmp_path: Path) -> None:
        folder = graded.root / "data/one/scores"
        copy = shutil.copytree(folder, tmp_path / "before", ignore=shutil.ignore_patterns(".*"))
        told = compared(graded, copy, TWO)
        assert told["figures"] == compared(graded, ONE, TWO)["figures"]
        (copy / "deep/b.parquet").unlink()
        missing = compared(graded, copy, TWO)["missing"]
        assert missing["b"]["rows"] == 3
        assert missing["b"]["examples"] == ["a1 of deep/b", "b2 of deep/b", "b3 of deep/b"]
        ended = graded.run("compare", copy, TWO)
        such = "such as a1 of deep/b; b2 of deep/b; b3 of deep/b"
        assert f"B has 3 rows that the other has not, {such}; 0 without a value" in ended.out

    def test_single_files_belong_together_whatever_their_names(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
        write(one, [("x", None, 1.0), ("y", None, 2.0)])
        write(two, [("y", None, 4.0), ("x", None, 1.0)])
        found = compared_files(one, two)
        assert sides(found) == ([1, 2], [1, 4])

    def test_samples_join_by_number_and_are_clusters_of_their_item(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
        write(one, [("x", 0, True), ("x", 1, False), ("y", 0, True), ("y", 1, True)])
        write(two, [("x", 1, True), ("x", 0, True), ("y", 0, False), ("y", 1, False)])
        found = compared_files(one, two)
        assert sides(found) == ([1, 0, 1, 1], [1, 1, 0, 0])
        figures = found.total()
        assert (found.cluster, figures.mcnemar) == ("item", None)
        difference = paired_difference([1, 0, 1, 1], [1, 1, 0, 0], "xxyy")
        assert figures.difference == difference.within(-1, 1)

    def test_one_sample_each_is_independent(self, tmp_path: Path) -> None:
        """Also where the other has several, or does not number its one."""
        one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
        write(one, [("x", 0, True), ("x", 1, False), ("y", 0, True), ("y", 1, False)])
        write(two, [("x", None, True), ("y", None, False)])
        found = compared_files(one, two)
        assert sides(found) == ([1, 1], [1, 0])
        assert (found.cluster, found.total().mcnemar) == (None, mcnemar(1, 0))
        assert found.missing[0].examples == ["x of one", "y of one"]

    def test_of_an_id_that_repeats_the_second_belongs_to_the_second(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
        write(one, [("x", None, 1), ("x", None, 2), ("y", None, 3), ("x", None, 9)])
        write(two, [("y", None, 6), ("x", None, 4), ("x", None, 5)])
        found = compared_files(one, two)
        assert sides(found) == ([1, 2, 3], [4, 5, 6])
        assert found.missing[0].examples == ["x of one"]

    def test_that_no_pair_differs_is_told(self, tmp_path: Path, graded: Project) -> None:
        one = write(tmp_path / "one.parquet", [("x", None, 1.0), ("y", None, 2.0)])
        ended = graded.run("compare", one, one)
        assert "no pair differs: the interval of B − A has no width" in ended.out

    def test_a_sample_is_shown_with_its_number(self, tmp_path: Path, graded: Project) -> None:
        one = write(tmp_path / "one.parquet", [("x", 0, 1), ("x", 1, 1)])
        two = write(tmp_path / "two.parquet", [("x", 0, 1), ("x", 1, 3)])
        ended = graded.run("compare", one, two, "--show", "1")
        assert re.search(r"id +┃ +sample", ended.out) and re.search(r"│ x +│ +1 │ 1 ", ended.out)

    def test_a_column_that_one_file_lacks_is_null_in_its_rows(
        self, tmp_path: Path, graded: Project
    ) -> None:
        for name, more in ("a", {"topic": ["law", "art"]}), ("b", {}):
            (tmp_path / "both").mkdir(exist_ok=True)
            columns = {**more, "value": [1, 2], "api_record_id": [f"{name}1", f"{name}2"]}
            pq.write_table(pa.table(columns), tmp_path / "both" / f"{name}.parquet")
        folder = tmp_path / "both"
        told = compared(graded, folder, folder, "--figure", "value", "--by", "topic")
        counts = {each["of"]: each["a"]["n"] for each in told["figures"]}
        assert counts == {"all": 4, "art": 1, "law": 1, "null": 2}

    def test_what_is_no_finite_number_is_no_value(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
        write(one, [("a", None, nan), ("b", None, 1.0), ("c", None, None), ("d", None, 2.0)])
        write(two, [("a", None, 1.0), ("b", None, inf), ("c", None, 1.0), ("d", None, 2.5)])
        found = compared_files(one, two)
        assert sides(found) == ([2], [2.5])
        assert [missing.unrated for missing in found.missing] == [2, 1]


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (("--figure", "pionts"), "--figure:pionts: .* no such column.*did you mean.*points"),
            (("--figure", "subject"), "--figure:subject: is string.*expected.*right, points"),
            (
                ("--by", "subjects"),
                "--by:subjects: .*no such column; expected id, easy, subject, by_one, by_two, "
                r"note, right, points; did you mean subject\?",
            ),
            (("--by", "topic"), "--by:topic: .*no such column"),
            (("--cluster", "topic"), "--cluster:topic: .*no such column"),
            (("--stage", "raw"), "choose the asset with --stage"),
        ],
    )
    def test_is_named(self, graded: Project, arguments: Sequence[str], told: str) -> None:
        ended = graded.run("compare", ONE, TWO, *arguments)
        assert ended.code in (1, 2)
        assert re.search(told, ended.err.replace("\n", " "), re.I), ended.err

    def test_copies_alone_do_not_say_what_is_a_rating(self, graded: Project) -> None:
        folders = graded.root / "data/one/scores", graded.root / "data/two/scores"
        ended = graded.run("compare", *folders)
        assert ended.code == 2
        assert "--figure: which column is compared?; expected easy, right, points" in ended.err
        assert compared(graded, *folders, "--figure", "right")["figures"][0]["rose"] == 2

    def test_lists_are_no_groups(self, tmp_path: Path) -> None:
        tags = pa.table({"tags": [["x"], []], "value": [1, 2], "api_record_id": ["a", "b"]})
        pq.write_table(tags, tmp_path / "one.parquet")
        side = copied_ratings(tmp_path / "one.parquet")
        with pytest.raises(SetupError, match=r"--by:tags: is list.*expected texts or numbers"):
            compare((side, side), None, "tags", None)

    def test_results_of_other_items_are_no_pairs(self, tmp_path: Path, graded: Project) -> None:
        one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
        write(one, [("x", None, 1)])
        write(two, [("y", None, 1), ("z", None, 1)])
        ended = graded.run("compare", one, two)
        assert ended.code == 1
        assert "1 rows that the other has not, such as x of one" in ended.err
        assert "2 rows that the other has not, such as y of two; z of two" in ended.err

    def test_a_folder_without_scores(self, tmp_path: Path, graded: Project) -> None:
        ended = graded.run("compare", tmp_path, ONE)
        assert ended.code == 1 and "no scores files; expected *.parquet" in ended.err


Item = tuple[str, int | None, Any]


def write(path: Path, items: Sequence[Item]) -> Path:
    """A scores file of ids, samples and ratings."""
    ids, samples, values = zip(*items, strict=True)
    columns: dict[str, Any] = {"value": values, "api_record_id": ids}
    if any(sample is not None for sample in samples):
        columns = {"sample": pa.array(samples, pa.int64()), **columns}
    pq.write_table(pa.table(columns), path)
    return path


def compared_files(one: Path, two: Path) -> Comparison:
    return compare((copied_ratings(one), copied_ratings(two)), "value", None, None)


def sides(found: Comparison) -> tuple[list[float], list[float]]:
    return found.pairs["0"].to_pylist(), found.pairs["1"].to_pylist()


RESULTS = st.dictionaries(
    st.tuples(st.sampled_from("abcdef"), st.integers(0, 2)),
    st.one_of(st.none(), st.integers(-5, 5)),
    min_size=1,
)


@given(RESULTS, RESULTS, st.randoms(use_true_random=False))
def test_any_order_gives_the_pairs_of_a_dict(
    one: Mapping[tuple[str, int], int], two: Mapping[tuple[str, int], int], random: Any
) -> None:
    both = {key: (one[key], two[key]) for key in one if key in two}
    pairs = [pair for pair in both.values() if None not in pair]
    rows = [[(*key, value) for key, value in side.items()] for side in (one, two)]
    random.shuffle(rows[1])
    with TemporaryDirectory() as folder:
        paths = [write(Path(folder, f"{n}.parquet"), rows[n]) for n in (0, 1)]
        if not pairs:
            return
        found = compared_files(paths[0], paths[1])
        changed = found.changed(len(pairs))
    assert [*zip(*sides(found), strict=True)] == pairs
    assert [each.rows for each in found.missing] == [len(one) - len(both), len(two) - len(both)]
    assert [each.unrated for each in found.missing] == [
        sum(pair[side] is None for pair in both.values()) for side in (0, 1)
    ]
    apart = [abs(each.second["value"] - each.first["value"]) for each in changed]
    assert apart == sorted((abs(b - a) for a, b in pairs if a != b), reverse=True)
    for each in changed:
        assert each.first["api_record_id"] == each.second["api_record_id"]
        assert each.first["sample"] == each.second["sample"]
        assert rows[0][each.row - 1][2] == each.first["value"]
