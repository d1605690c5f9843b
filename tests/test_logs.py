"""What runs tell: `modelcall logs`, and files below `logging.log_dir`."""

from __future__ import annotations

import re
from collections import Counter

import orjson
import pytest
from project import QUIET, TASK, A, B, C, Project, Row, read_rows, some_rows

from modelcall_assets.defs.instance import register
from modelcall_assets.records import encode_key
from modelcall_assets.rehearsal import Faults, RehearsalServer

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| (DEBUG|INFO|WARNING|ERROR) \| Job\d \| .+")
KEPT = {"logging": {"log_dir": "logs"}}
FAILED = "2 of 4 rows failed (50.00%), more than max_failure_rate 5.00%: bad_line 2"


def written(project: Project) -> dict[str, list[str]]:
    """The lines of each log file."""
    found = sorted((project.root / "logs").rglob("*.log"))
    return {each.name: each.read_text().splitlines() for each in found if each.is_file()}


def told(project: Project, *options: str) -> list[str]:
    ended = project.run("logs", TASK, *options)
    assert ended.code == 0, ended
    return ended.out.splitlines()


def launch(project: Project, key: str) -> bool:
    """As the UI would, all stages of one file; gives whether it ended well."""
    register(project.instance, project.steps())
    job = project.definitions().resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=project.instance,
        asset_selection=[project.asset_key("raw"), project.asset_key("scores")],
        partition_key=key,
        run_config=QUIET,
        raise_on_error=False,
    ).success


def test_the_last_run_is_told_file_by_file(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    lines = told(project)
    assert all(LINE.fullmatch(line) for line in lines), lines
    for stage in ("raw", "scores"):
        ends = [line.partition(f"INFO | Job0 | {stage}: ")[2] for line in lines]
        good = {f"{name}: 4 rows in, 4 succeeded, 0 failed" for name in (A, B, C)}
        assert good == {end for end in ends if "rows in" in end}
    assert any("scores: 12 of 12 rows" in line for line in lines), "how it went on"
    assert not (project.root / "logs").exists()


def test_why_a_run_is_red_stands_last(project: Project) -> None:
    project.write_input(A, [*some_rows(2), b"{torn", b"[2]"])
    assert project.run("run-task", TASK).code == 1
    assert f"ERROR | Job0 | {A}: {FAILED}" in told(project)[-1]
    assert told(project, "--limit", "1") == told(project)[-1:]
    [last] = project.run("logs", "--task", TASK, "--limit", "1", "--json").out.splitlines()
    row = orjson.loads(last)
    assert list(row) == ["time", "level", "job", "message"]
    assert row["level"] == "ERROR" and FAILED in row["message"]


def test_all_runs_are_a_table_and_each_can_be_asked_for(project: Project) -> None:
    ended = project.run("logs", TASK)
    assert (ended.code, "no such run yet" in ended.err) == (1, True)
    project.write_input(A, [*some_rows(2), b"{torn", b"[2]"])
    assert project.run("run-task", TASK).code == 1
    project.write_input(A, some_rows(4))
    project.write_task(KEPT)
    assert project.run("run-task", TASK).code == 0
    last, first = map(orjson.loads, project.run("logs", "--json").out.splitlines())
    assert (last["task"], last["ended"], first["ended"]) == ("rate", "well", "failed")
    assert [last["log_file"].removeprefix("logs/rate/")] == [*written(project)]
    assert FAILED in told(project, "--run", first["run"])[-1]
    assert FAILED not in "".join(told(project))
    assert last["run"] in project.run("logs").out
    assert project.run("logs", TASK, "--run", "no").code == 1


def test_a_task_that_asks_for_a_file_gets_what_the_command_shows(project: Project) -> None:
    project.write_task(KEPT)
    assert project.run("run-task", TASK).code == 0
    [(name, lines)] = written(project).items()
    assert re.fullmatch(r"rate_\d{8}_\d{6}\.log", name)
    assert sorted(lines) == sorted(told(project))
    assert (project.root / "logs/rate" / name).is_file()


def test_runs_of_the_ui_write_one_too(project: Project) -> None:
    project.write_task(KEPT)
    project.write_input(A, [*some_rows(2), b"{torn", b"[2]"])
    assert not launch(project, A)
    [lines] = written(project).values()
    assert lines == told(project), "each step once"
    assert FAILED in lines[-1]
    assert launch(project, encode_key(B))
    assert f"scores: {B}: 4 rows in, 4 succeeded" in "".join(told(project))


def test_only_what_is_worth_a_line_is_in_the_file(project: Project) -> None:
    project.write_task({"logging": {"log_dir": "logs", "level": "ERROR"}})
    project.write_input(A, [*some_rows(2), b"{torn", b"[2]"])
    assert project.run("run-task", TASK).code == 1
    [lines] = written(project).values()
    assert {line.split(" | ")[1] for line in lines if LINE.match(line)} == {"ERROR"}


def test_each_of_several_jobs_has_its_own(project: Project) -> None:
    project.write_task(KEPT)
    for number in "01":
        share = ("--job-index", number, "--world-size", "2")
        assert project.run("run-task", TASK, *share).code == 0
    first, second = written(project).items()
    assert (first[0][-11:], second[0][-11:]) == ("_job000.log", "_job001.log")
    for (_, lines), job, names in ((first, "Job0", (A, B)), (second, "Job1", (C,))):
        assert {line.split(" | ")[2] for line in lines} == {job}
        assert {name for name in (A, B, C) if f"scores: {name}: 4 rows" in str(lines)} == {*names}


def kill_in_the_middle(project: Project, server: RehearsalServer) -> None:
    """Of a run, as `kill -9` does; the next one is answered at once."""
    project.write_task(KEPT)
    project.write_input(A, some_rows(60))
    server.set_faults(Faults(latency_ms=50))
    project.signalled(lambda: server.stats()["answered"] >= 10, "run-task", project.task_file)
    server.set_faults(Faults())


def test_a_killed_run_says_so_and_the_next_has_another_file(
    project: Project, server: RehearsalServer
) -> None:
    kill_in_the_middle(project, server)
    assert told(project)[-1].endswith("ERROR | Job0 | The process of this run was killed.")
    killed = written(project)
    assert project.run("run-task", TASK).code == 0
    both = written(project)
    assert len(both) == 2 and both.items() >= killed.items()
    made = "".join(line for lines in both.values() for line in lines)
    assert made.count(f"scores: {A}: 60 rows in, 60 succeeded") == 1
    for name in (B, C):  # none where the kill came between Dagster's note and the line
        assert made.count(f"scores: {name}: 4 rows in, 4 succeeded") <= 1


@pytest.mark.parametrize("stands", ["logs", "logs/rate"])
def test_a_place_that_is_no_folder_is_refused_before_anything_is_paid(
    project: Project, server: RehearsalServer, stands: str
) -> None:
    project.write_task(KEPT)
    (project.root / stands).parent.mkdir(exist_ok=True)
    (project.root / stands).write_text("in the way")
    ended = project.run("run-task", TASK)
    assert ended.code == 2
    assert "rate.yaml:logging.log_dir: a file stands there" in ended.err
    assert server.stats()["requests"] == 0


def test_a_folder_of_the_input_is_refused(project: Project, server: RehearsalServer) -> None:
    project.write_task({"logging": {"log_dir": project.inputs}})
    ended = project.run("run-task", TASK)
    assert ended.code == 2
    assert "logging.log_dir: the folder lies in the input folder" in ended.err
    assert server.stats()["requests"] == 0


def test_a_file_that_cannot_be_made_is_told_before_anything_is_paid(
    project: Project, server: RehearsalServer
) -> None:
    project.write_task(KEPT)
    (project.root / "logs").mkdir()
    (project.root / "logs/rate").symlink_to("/proc/self/fdinfo")
    ended = project.run("run-task", TASK)
    assert ended.code in (1, 2), "by who runs this, it is seen at once or when it is tried"
    assert "logs/rate" in ended.err
    assert server.stats()["requests"] == 0


def test_no_key_is_in_a_log(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-a1b2c3d4e5f6g7h8"
    monkeypatch.setenv("A_KEY", key)
    project.write_model(
        {"client_config": {"api_key": "${A_KEY}", "base_url": f"http://{key}.invalid"}}
    )
    project.write_task(KEPT)
    assert project.run("run-task", TASK).code == 1
    [lines] = written(project).values()
    assert lines[-1] and key not in str(lines), lines


# How rows ended


def details(project: Project) -> list[Row]:
    found = sorted((project.root / "logs/rate").glob("*details*"))
    return [row for each in found for row in read_rows(each)]


def stats(project: Project) -> Row:
    return orjson.loads((project.root / "logs/rate/rate_final_stats.json").read_bytes())["stats"]


def outcomes(rows: list[Row]) -> list[tuple[str, str, object, object]]:
    return [(r["api_record_id"], r["api_status"], r["score"], r["api_fail_reason"]) for r in rows]


def test_details_and_numbers_are_those_of_the_outputs(project: Project) -> None:
    project.write_task(
        {**KEPT, "max_failure_rate": 0.3, "logging": {"log_dir": "logs", "batch_size": 3}}
    )
    project.write_input(A, [*some_rows(2), b"{torn", b"[2]"])
    project.write_input(B, [*some_rows(4, "second"), {"id": "empty", "text": None}])
    assert project.run("run-task", TASK).code == 1
    found = details(project)
    for name in (A, B, C):
        own = [r for r in found if r["file"] == name]
        told = [(r["item_id"], r["status"], r["score"], r["fail_reason"]) for r in own]
        assert told == outcomes(project.scores(name))
    numbers = stats(project)
    failed = sum(row["status"] == "error" for row in found)
    assert failed > 2
    assert numbers["success_items"] + numbers["failed_items"] == len(found) == 13
    assert (numbers["failed_items"], numbers["processed_items"]) == (failed, 13)
    files = [numbers[f"{name}_files"] for name in ("total", "processed", "failed")]
    assert files == [3, 2, 1]
    assert numbers["success_rate"] == round(100 * (13 - failed) / 13, 2)
    shown = project.run("logs", TASK, "--details", "--json", "--limit", "5").out.splitlines()
    assert [orjson.loads(line) for line in shown] == found[-5:]
    [line] = project.run("logs", TASK, "--stats", "--json").out.splitlines()
    assert orjson.loads(line).items() >= numbers.items()


def test_a_killed_run_and_the_next_tell_of_each_row_once(
    project: Project, server: RehearsalServer
) -> None:
    kill_in_the_middle(project, server)
    assert project.run("run-task", TASK).code == 0
    told = Counter((row["file"], row["item_id"]) for row in details(project))
    rows = [(name, row["api_record_id"]) for name in (A, B, C) for row in project.scores(name)]
    assert told == Counter(rows)


def test_each_job_and_each_run_of_the_ui_tells_of_its_rows(project: Project) -> None:
    project.write_task(KEPT)
    assert launch(project, A) and launch(project, encode_key(B))
    assert [row["file"] for row in details(project)] == [A] * 4 + [B] * 4
    assert stats(project)["processed_items"] == 4, "of the last run"
    for number in "01":
        share = ("--job-index", number, "--world-size", "2", "--fresh")
        assert project.run("run-task", TASK, *share).code == 0
    found = details(project)
    assert [row["file"] for row in found if row["job_index"] == 1] == [C] * 4
    assert len(found) == 8 + 12


def test_only_the_end_of_a_huge_file_is_read_and_torn_lines_are_left_out(project: Project) -> None:
    project.write_task(KEPT)
    assert "no such run yet" in project.run("logs", TASK, "--details").err
    assert project.run("run-task", TASK).code == 0
    found = details(project)
    file = project.root / "logs/rate/rate_batch_details.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    with file.open("r+b") as opened:
        opened.seek(opened.truncate(1 << 36))  # a hole, of more than a machine's memory
        opened.write(b"".join([b"\n", first, b'{"ti\n', *rest, b'{"timestamp": "20']))
    file.with_name("rate_batch_details_job001.jsonl").touch()
    shown = project.run("logs", TASK, "--details", "--json", "--limit", str(len(found)))
    assert [orjson.loads(line) for line in shown.out.splitlines()] == found, shown.err
    (project.root / "logs/rate/rate_final_stats.json").write_bytes(b'{"ru')
    ended = project.run("logs", TASK, "--stats")
    assert ended.code == 1 and "no such run yet" in ended.err


def test_who_asks_for_files_that_are_not_kept_is_told_how(project: Project) -> None:
    ended = project.run("logs", TASK, "--details")
    assert ended.code == 2
    assert "rate.yaml:logging.log_dir: not given; add `logging:`" in ended.err
    assert project.run("logs", "--stats").code == 2
