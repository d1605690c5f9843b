"""`modelcall clean` deletes what it says, and nothing that somebody may still need."""

from __future__ import annotations

import os
import pty
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import NAMES, TASK, A, B, C, Ended, Project, some_rows

from modelcall_assets.journal import Journal
from modelcall_assets.journal.lines import Address, Entry
from modelcall_assets.journal.segments import segment_paths
from modelcall_assets.rehearsal import RehearsalServer

DAY_S = 86400


def clean(project: Project, *options: str) -> Ended:
    return project.run("clean", TASK, *options)


def everything(project: Project) -> dict[Path, bytes]:
    """Files of the data folder; locks are made by looking."""
    found = (path for path in (project.root / "data").rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in found if path.name != ".lock"}


def of_input(project: Project, name: str) -> list[Path]:
    """What lies there of an input, but for the input itself."""
    stem = Path(name).stem
    manifests = (stage.manifest_path(name) for stage in project.steps().stages)
    preprocessed = project.root / "data/rate/preprocessed" / Path(name).with_name(f"{stem}.parquet")
    paths = [project.output(name), preprocessed, *manifests, project.journal(name)]
    return [path for path in paths if path.exists()]


def partition_keys(project: Project) -> list[str]:
    return list(project.instance.get_dynamic_partitions("rate/files"))


def age(paths: Iterator[Path] | list[Path], days: float) -> None:
    for path in paths:
        os.utime(path, (time.time() - days * DAY_S,) * 2)


@pytest.fixture
def scored(project: Project, server: RehearsalServer) -> Project:
    assert project.run("run-task", TASK).code == 0
    return project


def test_what_a_crash_left_goes_and_nothing_else(scored: Project) -> None:
    before = everything(scored)
    assert "nothing to delete" in clean(scored).out
    folders = [scored.output(C).parent, scored.journal(A), scored.input_folder]
    left = [folder / f".{number:032x}.tmp" for number, folder in enumerate(folders)]
    young = scored.output(C).parent / f".{9:032x}.tmp"
    for path in (*left, young):
        path.write_bytes(b"x" * 1500)
    age(left, 0.1)
    dry = clean(scored, "--dry-run")
    assert dry.code == 0
    assert re.search(r"together +│ 3,000 ", dry.out) and "nothing deleted: --dry-run" in dry.out
    assert all(path.exists() for path in left)
    ended = clean(scored, "--yes")
    assert (ended.code, "deleted 2 of 2" in ended.out) == (0, True), ended
    assert [path.exists() for path in left] == [False, False, True], "inputs are the user's"
    left[2].unlink()
    young.unlink()
    assert everything(scored) == before


def test_old_journals_of_published_files_go(scored: Project) -> None:
    """B's replies are new; C has one that was not published yet."""
    entry = Entry(Address("0" * 32), 0, 200, b"{}", "h", 1, 1, "t")
    with Journal(scored.journal(C), "killed") as journal:
        journal.append(entry)
    for name in (A, C):
        age(segment_paths(scored.journal(name)), 31)
    assert "nothing to delete" in clean(scored, "--journal-older-than", "32").out
    ended = scored.run("clean", TASK, "--journal_older_than", "30", "--yes")
    assert (ended.code, "deleted 1 of 1" in ended.out) == (0, True), ended
    assert "is asked again in full" in ended.out
    assert [scored.journal(name).exists() for name in NAMES] == [False, True, True]
    assert len(scored.scores(A)) == 4

    assert "nothing to do" in scored.run("run-task", TASK).out
    scored.output(A).unlink()
    again = scored.run("run-task", TASK)
    assert "4 requests sent" in again.out, again


def test_an_old_journal_that_a_rejected_result_waits_with_stays(
    scored: Project, server: RehearsalServer
) -> None:
    """Its good replies are paid for."""
    rows = [*some_rows(4, "other"), {"id": "no text"}]
    scored.write_input(A, rows)
    assert scored.run("run-task", TASK, "--file", A).code == 1
    assert scored.rejected(A).exists() and scored.output(A).exists()
    age(segment_paths(scored.journal(A)), 31)
    assert "nothing to delete" in clean(scored, "--journal-older-than", "30").out
    paid = server.stats()["requests"]
    scored.write_input(A, [*rows[:-1], {"id": "no text", "text": "now it has one"}])
    assert scored.run("run-task", TASK, "--file", A).code == 0
    assert server.stats()["requests"] == paid + 1


def test_a_journal_in_use_stays(scored: Project) -> None:
    age(segment_paths(scored.journal(A)), 31)
    age(segment_paths(scored.journal(B)), 31)
    before = everything(scored)
    with Journal(scored.journal(A), "running"):
        ended = clean(scored, "--journal-older-than", "30", "--yes")
    assert ended.code == 1
    assert f"{A}: a run is working on it" in ended.err
    assert "deleted 1 of 2" in ended.out
    gone = before.keys() - everything(scored).keys()
    assert {path.parent for path in gone} == {scored.journal(B)}


def test_all_of_a_deleted_input_goes(project: Project) -> None:
    options = {"enabled": True, "script_type": "universal"}
    folder = {"output_folder": "data/{task_name}/preprocessed"}
    project.write_task({"preprocess": {**options, **folder}})
    assert project.run("run-task", TASK).code == 0
    assert [len(of_input(project, name)) for name in NAMES] == [6, 6, 6]
    assert "nothing to delete" in clean(project, "--deleted-inputs").out
    (project.input_folder / B).unlink()
    assert "nothing to delete" in clean(project).out
    before = everything(project)
    shown = clean(project, "--deleted-inputs", "--dry-run")
    assert B in shown.out and A not in shown.out and "input is gone" in shown.out
    assert everything(project) == before and partition_keys(project) == list(NAMES)
    ended = clean(project, "--deleted-inputs", "--yes")
    assert (ended.code, "deleted 1 of 1" in ended.out) == (0, True), ended
    assert [len(of_input(project, name)) for name in NAMES] == [6, 0, 6]
    assert partition_keys(project) == [A, C]
    assert "nothing to delete" in clean(project, "--deleted-inputs").out

    project.write_input(B, some_rows(4, "second"))
    again = project.run("run-task", TASK)
    assert "3 of 3 files scored" in again.out and "4 requests sent" in again.out


def test_an_output_that_another_input_has_now_stays(scored: Project) -> None:
    (scored.input_folder / A).unlink()
    scored.write_input("a.parquet", some_rows(5, "other"))
    assert scored.run("run-task", TASK).code == 0
    assert clean(scored, "--deleted-inputs", "--yes").code == 0
    assert len(scored.scores("a.parquet")) == 5
    assert not scored.journal(A).exists()
    assert scored.journal("a.parquet").exists()


@pytest.mark.parametrize("made", [True, False], ids=["changed", "never ours"])
def test_what_somebody_put_at_the_place_of_a_deleted_inputs_output_stays(
    project: Project, made: bool
) -> None:
    """A result of ours that was changed since, or an old one that the run has refused."""
    if made:
        assert project.run("run-task", TASK).code == 0
    place = project.output(A)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"theirs")
    assert project.run("run-task", TASK).code == (0 if made else 1)
    (project.input_folder / A).unlink()
    for options in (("--dry-run",), ("--yes",)):
        ended = clean(project, "--deleted-inputs", *options)
        assert (ended.code, f"{place}: stays" in ended.out) == (0, True), ended
    assert place.read_bytes() == b"theirs"
    assert of_input(project, A) == [place] and partition_keys(project) == [B, C]


def test_inputs_that_the_task_leaves_out_are_not_gone(scored: Project) -> None:
    """A cap, a pattern, or another input folder say nothing about the files."""
    before = everything(scored)
    for changes in (
        {"debug": {"enabled": True, "max_files": 1}},
        {"preprocess": {"enabled": True, "script_type": "universal", "file_pattern": "a*"}},
    ):
        scored.write_task(changes)
        assert "nothing to delete" in clean(scored, "--deleted-inputs", "--yes").out
    elsewhere = scored.root / "data/elsewhere"
    elsewhere.mkdir()
    (elsewhere / "new.jsonl").write_bytes(b"{}\n")
    scored.write_task({"data": {"input_folder": "data/elsewhere"}})
    assert "nothing to delete" in clean(scored, "--deleted-inputs", "--yes").out
    (elsewhere / "new.jsonl").unlink()
    elsewhere.rmdir()
    assert everything(scored) == before


@pytest.mark.parametrize("missing", [False, True])
def test_a_disk_that_is_not_mounted_deletes_nothing(scored: Project, missing: bool) -> None:
    folder = scored.input_folder
    folder.rename(scored.root / "unmounted")
    if not missing:
        folder.mkdir()
    before = everything(scored)
    ended = clean(scored, "--deleted-inputs", "--yes")
    assert ended.code == 1
    assert ("not found" if missing else "is the disk mounted?") in ended.err
    assert everything(scored) == before and len(partition_keys(scored)) == 3


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 0)])
def test_on_a_terminal_it_asks_first(scored: Project, answer: str, code: int) -> None:
    age(segment_paths(scored.journal(A)), 31)
    keyboard, terminal = pty.openpty()
    process = scored.start("clean", TASK, "--journal-older-than", "30", stdin=terminal)
    os.write(keyboard, f"{answer}\n".encode())
    out, err = process.communicate(timeout=60)
    os.close(terminal)
    os.close(keyboard)
    assert process.returncode == code, err
    assert "delete this?" in out
    assert scored.journal(A).exists() == (answer == "n")


def test_without_a_terminal_it_wants_a_yes(scored: Project) -> None:
    age(segment_paths(scored.journal(A)), 31)
    ended = scored.run("clean", TASK, "--journal-older-than", "30")
    assert ended.code == 2
    assert "Error: --yes: there is no terminal to ask on; add --yes" in ended.err
    assert scored.journal(A).exists()
