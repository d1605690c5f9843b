"""`modelcall verify` finds what is damaged or left over, and says what to do; and it helps."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packs import repomix_xml
from project import INS, TASK, A, B, C, Ended, Project, asked, chat, instruction, some_rows

from modelcall_assets.defs.sensors import Cursor, Page
from modelcall_assets.journal.segments import segment_paths
from modelcall_assets.rehearsal import RehearsalServer
from modelcall_assets.stages.publication import Note, write_note
from modelcall_assets.stages.report import Tally
from modelcall_assets.storage.files import file_digest


def flip(path: Path, what: bytes = b"") -> None:
    """One bit, in the middle or where these bytes are."""
    data = bytearray(path.read_bytes())
    data[data.index(what) if what else len(data) // 2] ^= 4
    path.write_bytes(data)


def told(ended: Ended) -> str:
    return " ".join(ended.told.split())


def test_what_is_damaged_is_found_and_the_advice_mends_it(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    sound = project.run("verify", TASK)
    assert (sound.code, "all is sound" in sound.out) == (0, True), sound
    state = project.root / "data/rate/scores/.modelcall/rate"
    manifest = state / "manifests/scores" / f"{C}.json"

    flip(project.output(A), b"PAR1")
    project.output(B).unlink()
    (segment,) = segment_paths(state / "journal/scores" / C)
    flip(segment, b"content")
    flip(manifest, b"{")
    found = project.run("verify", TASK)
    assert found.code == 1
    for what in (
        f"scores: {A}: {project.output(A)}: not what scores published; delete it and run the task",
        f"scores: {B}: {project.output(B)} is gone; run the task again",
        f"scores: {C}: its manifest is damaged",
        f"scores: {C}: 1 damaged lines in its journal: {segment}",
        "rate: 4 findings",
    ):
        assert what in told(found), found
    for name in ("export", "report"):
        ended = project.run(name, TASK, "--file", A)
        assert (ended.code, "not what scores published" in ended.err) == (1, True), ended

    project.output(A).unlink()
    project.output(C).unlink()
    manifest.unlink()
    again = project.run("run-task", TASK)
    assert "1 request sent" in again.out, "of the one reply that was damaged"
    assert f"warning: {C}: damaged lines in its journal: 1 in {segment.name}" in again.out
    assert "all is sound" in project.run("verify", TASK).out


@pytest.mark.parametrize("damage", [None, b'{"format": 1, "sta'])
def test_a_file_whose_manifest_is_damaged_or_gone_is_made_again_for_nothing(
    damage: bytes | None, project: Project, server: RehearsalServer
) -> None:
    """The output is ours and sound."""
    assert project.run("run-task", TASK).code == 0
    manifest = project.root / f"data/rate/scores/.modelcall/rate/manifests/scores/{A}.json"
    before, paid = project.output(A).read_bytes(), server.stats()["requests"]
    if damage is None:
        manifest.unlink()
    else:
        manifest.write_bytes(damage)
    assert project.run("verify", TASK).code == 1
    again = project.run("run-task", TASK)
    assert again.code == 0, again
    assert project.output(A).read_bytes() == before
    assert server.stats()["requests"] == paid
    assert project.run("verify", TASK).code == 0

    project.output(A).write_bytes(b"somebody's")
    manifest.unlink()
    assert "this file was not written by this task" in told(project.run("run-task", TASK))
    assert project.output(A).read_bytes() == b"somebody's"


def test_a_manifest_that_counts_other_rows_than_there_are_is_damaged(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    for key, counts in ((A, ("rows",)), (B, ("rows", "ok"))):
        path = project.root / f"data/rate/scores/.modelcall/rate/manifests/scores/{key}.json"
        manifest = json.loads(path.read_bytes())
        path.write_text(json.dumps(manifest | {name: manifest[name] + 1 for name in counts}))
    found = project.run("verify", TASK)
    assert f"scores: {A}: its manifest is damaged" in told(found), found
    rows = len(project.scores(B))
    says = f"scores: {B}: its manifest is damaged: it says {rows + 1} rows, and {project.output(B)}"
    assert f"{says} has {rows}" in told(found), found
    assert found.code == 1 and "2 findings" in found.out


def test_a_folder_at_an_outputs_place_is_one_finding_among_others(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    project.output(A).unlink()
    project.output(A).mkdir()
    flip(project.output(B))
    found = told(project.run("verify", TASK))
    assert f"{project.output(A)}: a folder where a file belongs; move it away" in found
    assert f"{project.output(B)}: not what scores published" in found and "2 findings" in found


def test_a_manifest_that_cannot_be_looked_at_is_named(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    path = project.root / f"data/rate/scores/.modelcall/rate/manifests/scores/{A}.json"
    path.unlink()
    path.mkdir()
    for command in ("verify", "run-task"):
        found = project.run(command, TASK)
        assert f"{path}: a folder where a file belongs; move it away" in told(found), command
        assert "Traceback" not in found.told
        assert found.code, command


def test_what_it_costs_to_make_anew_depends_on_the_journal(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    flip(project.output(A), b"PAR1")
    project.output(B).unlink()
    assert told(project.run("verify", TASK)).count("its rows cost nothing") == 2
    assert project.run("clean", TASK, "--journal-older-than", "0", "--yes").code == 0
    found = told(project.run("verify", TASK))
    assert found.count("its journal is gone: all its rows are asked again") == 2
    assert "cost nothing" not in found


@pytest.mark.parametrize("stage", ["scores", "merged"])
def test_a_manifest_with_another_digest_is_damaged_and_the_advice_mends_it(
    stage: str, distilling: Project, server: RehearsalServer
) -> None:
    distilling.write_chain()
    distilling.write_dataset("Ins", [instruction(number) for number in range(4)])
    distilling.write_dataset("Chats", [chat(number) for number in range(3)])
    task = str(distilling.task_file)
    assert distilling.run("run-task", task).code == 0
    paid = server.stats()["requests"]
    path = Path(str(distilling.steps().stage(stage).manifest_path("all.jsonl")))
    manifest = json.loads(path.read_bytes())
    digest = manifest["output_digest"]
    other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    path.write_text(json.dumps(manifest | {"output_digest": other}))
    found = distilling.run("verify", task)
    assert "all.jsonl: its manifest is damaged" in told(found), found
    assert "delete it and the output that it describes" in told(found)
    path.unlink()
    Path(manifest["output"]).unlink()
    assert distilling.run("run-task", task).code == 0
    assert distilling.run("verify", task).code == 0
    assert server.stats()["requests"] == paid


@pytest.mark.parametrize("command", ["export", "report", "failures"])
def test_no_file_is_left_out_because_its_manifest_is_damaged(
    command: str, project: Project
) -> None:
    assert project.run("run-task", TASK).code == 0
    manifest = project.root / f"data/rate/scores/.modelcall/rate/manifests/scores/{A}.json"
    manifest.write_bytes(b"{")
    ended = project.run(command, TASK)
    assert ended.code == 1 and f"{A}: its manifest is damaged: {manifest}; delete it" in ended.err
    assert project.run(command, TASK, "--file", B).code == 0


def test_what_belongs_to_no_input_is_told(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    (project.input_folder / A).rename(project.input_folder / "renamed.jsonl")
    project.output("renamed.jsonl").write_bytes(b"mine")
    ended = project.run("verify", TASK)
    assert ended.code == 1
    assert f"{A}: its input is gone or was renamed; what was made of it is kept" in ended.out
    place = project.output("renamed.jsonl")
    assert f"scores: renamed.jsonl: no manifest describes {place}: it is not this" in told(ended)
    assert "`modelcall adopt configs/tasks/rate.yaml` keeps it" in told(ended)
    assert f"`modelcall clean {TASK} --deleted-inputs` deletes it" in ended.out


def test_what_lies_aside_is_no_orphan_and_is_looked_at(project: Project) -> None:
    """Of A the result is rejected, of B what was there is set aside."""
    place = project.output(B)
    place.parent.mkdir(parents=True)
    (project.input_folder / C).unlink()
    project.write_input(A, [*some_rows(1), {"id": "no text"}])
    task = project.steps()
    write_note(task.stage("scores"), B, Note(adopt=True))
    pq.write_table(pa.table({"text": ["of the old system"]}), place)
    assert project.run("run-task", TASK).code == 1
    sound = project.run("verify", TASK)
    assert (sound.code, "all is sound" in sound.out) == (0, True), sound

    rejected = project.rejected(A)
    (aside,) = (project.root / "data").rglob("set_aside/scores/*/b.parquet")
    for path in (rejected, aside):
        flip(path)
    orphan = rejected.with_name("c.parquet")
    orphan.write_bytes(b"half")
    found = project.run("verify", TASK)
    for what in (
        f"scores: {A}: {rejected}: not what scores published",
        f"{aside} is not what was set aside; bring it back from a copy",
        f"scores: c.parquet: {orphan}: a kill came between it and its manifest, or",
        "rate: 3 findings",
    ):
        assert what in told(found), found

    Path(str(task.stage("scores").manifest_path(B))).unlink()
    written = Note(written=(file_digest(project.output(B)),))
    write_note(task.stage("scores"), B, written)
    found = project.run("verify", TASK)
    what = f"scores: {B}: {project.output(B)}: a kill came between it and its manifest; run the"
    assert what in told(found), found


class TestPacks:
    @pytest.fixture
    def packs(self, project: Project) -> Project:
        for path in sorted((project.input_folder).rglob("*.*")):
            path.unlink()
        folder = project.input_folder / "Python"
        folder.mkdir()
        (folder / "ada_engine_1a2b3c.xml").write_bytes(
            repomix_xml({"README.md": "# Engine\n", "a.py": "print(1)\n"})
        )
        options = {"enabled": True, "script_type": "repo_xml", "max_tokens": 5000}
        project.write_task({"preprocess": options})
        return project

    def test_the_version_of_a_group_has_the_names_of_its_files(self, packs: Project) -> None:
        before = packs.steps().stage("raw").make("Python", Tally()).data_version
        folder = packs.root / "data/in/Python"
        assert packs.steps().stage("raw").make("Python", Tally()).data_version == before
        (folder / "ada_engine_1a2b3c.xml").rename(folder / "bob_motor_1a2b3c.xml")
        assert packs.steps().stage("raw").make("Python", Tally()).data_version != before

    def test_raw_packs_are_read_as_what_they_are(self, packs: Project) -> None:
        packs.steps().stage("raw").make("Python", Tally())
        for command in ("export", "failures", "report"):
            ended = packs.run(command, TASK, "--stage", "raw")
            assert ended.code == 0, ended
        (exported,) = (packs.root / "data").rglob("*_export/raw/*.jsonl")
        assert exported.read_text().count("\n") == 1
        assert "ada_engine_1a2b3c.xml" in exported.read_text()


def test_one_data_set_that_is_missing_stops_no_other(distilling: Project) -> None:
    distilling.write_chain()
    distilling.write_dataset("Ins", [instruction(number) for number in range(4)])
    ended = distilling.run("run-task", distilling.task_file)
    assert ended.code == 1
    assert f"{distilling.root / 'data/sets/org/Chats'}: not found" in ended.err
    assert len(distilling.rows(INS, "chatml")) == 4
    distilling.write_dataset("Chats", [chat(number) for number in range(3)])
    assert distilling.run("run-task", distilling.task_file).code == 0


@pytest.mark.parametrize(
    ("stage", "names", "next_stage"),
    [
        ("chatml", "[!.]*/*.jsonl", "merged"),
        ("merged", "[!.]*.jsonl", "responses"),
        ("responses", "[!.]*.jsonl", "scores"),
    ],
)
def test_a_file_between_stages_that_was_changed_is_noticed_before_anybody_is_asked(
    stage: str, names: str, next_stage: str, distilling: Project, server: RehearsalServer
) -> None:
    distilling.write_chain()
    distilling.write_dataset("Ins", [instruction(number) for number in range(4)])
    distilling.write_dataset("Chats", [chat(number) for number in range(3)])
    assert distilling.run("run-task", distilling.task_file).code == 0
    paid = server.stats()["requests"]
    outputs = [*(distilling.root / "data" / next_stage).glob("[!.]*.*")]
    for output in outputs:
        output.unlink()
    changed = [*(distilling.root / "data" / stage).glob(names)]
    before = {path: path.read_bytes() for path in changed}
    for path, lines in before.items():
        path.write_bytes(lines + lines.splitlines(keepends=True)[0])
    ended = distilling.run("run-task", distilling.task_file)
    assert ended.code == 1
    assert f"{changed[0]} changed since it was looked at" in ended.err, ended
    assert "delete it first" in ended.err
    assert outputs and not any(output.exists() for output in outputs)

    for path in changed:
        path.unlink()
    again = distilling.run("run-task", distilling.task_file)
    assert again.code == 0, again
    assert {path: path.read_bytes() for path in changed} == before
    assert server.stats()["requests"] == paid, "nothing was asked about the changed rows"


def test_the_replies_that_inputs_got_go_with_them(distilling: Project) -> None:
    distilling.write_generation()
    distilling.write_input("a.jsonl", [asked("a?")])
    distilling.write_input("b.jsonl", [asked("b?")])
    assert distilling.run("run-task", distilling.task_file).code == 0
    (distilling.input_folder / "b.jsonl").unlink()
    journals = distilling.root / "data/responses/.modelcall/chain/journal/responses"
    assert [path.name for path in sorted(journals.iterdir())] == ["a.jsonl", "b.jsonl"]
    ended = distilling.run("clean", distilling.task_file, "--deleted-inputs", "--yes")
    assert ended.code == 0, ended
    assert [path.name for path in journals.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "content",
    [
        *(b'{"usd":1.5,"tok', b"\0" * 50, b"[]", b'{"usd":"x"}', b"null", b"", b"{}"),
        *(b'{"tokens":-5}', b'{"usd":0.1,"tokens":5}', b'{"usd":0.1,"tokens":-5,"replies":1}'),
    ],
)
def test_a_damaged_count_of_what_was_spent_stops_a_run_and_says_what_to_do(
    content: bytes, project: Project
) -> None:
    project.write_task({"budget_tokens": 100_000})
    path = project.root / "data/rate/scores/.modelcall/rate/spent.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    project.write_input(A, some_rows(2))
    ended = project.run("run-task", TASK, "--file", A)
    assert ended.code == 1
    assert f"{path}: damaged: what the task has spent of its budget is not" in told(ended)
    assert path.read_bytes() == content
    found = project.run("verify", TASK)
    assert found.code == 1 and f"spent.json: {path}: damaged: what the task has" in told(found)


def test_a_cursor_forgets_what_begins_inside_the_page_it_read() -> None:
    """Each file once began a page, and the listing has become one page."""
    starts = [f"{number:04d}" for number in range(1000)]
    cursor = Cursor("", dict.fromkeys(["", *starts], "digest"))
    page = Page("", "0499", {})
    assert [*cursor.next(page, is_settled=True).settled] == [*starts[499:], ""]
    assert [*cursor.next(Page("", "", {}), is_settled=True).settled] == [""]


@pytest.mark.parametrize("text", ["{", "[]", '{"after": 1}', '{"settled": []}', "null", "\0"])
def test_a_damaged_cursor_is_a_new_one(text: str) -> None:
    assert Cursor.parse(text) == Cursor()
