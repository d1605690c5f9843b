"""The environment service: what it is asked, what becomes of its faults, and that nothing stays
open there, whoever is killed."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import dagster as dg
import environment_server
import pyarrow.parquet as pq
import pytest
from environment_server import EnvironmentServer, Fault, environment, first_state, reward_of
from hypothesis import given, settings
from hypothesis import strategies as st
from project import GENERATE, RED, Ended, Project, Row, looked_at_by, until

from modelcall_assets.errors import InputError
from modelcall_assets.grading.environment import Environment
from modelcall_assets.records.outcome import Failure, Reason, Success
from modelcall_assets.rehearsal import RehearsalServer
from modelcall_assets.sources.env_service import Service, ServiceGone, run
from modelcall_assets.sources.environment import EnvironmentTasks
from modelcall_assets.transforms.user_code import grade

pytestmark = pytest.mark.slow

QUICK = {"retry_wait_s": 0.01}


@pytest.fixture(autouse=True)
def own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/modelcall/environments"


def look_back(server: EnvironmentServer) -> None:
    """As the next run does that asks the service."""
    run(Service(server.url).tasks("gym", "train"))


@pytest.fixture
def gym() -> Iterator[EnvironmentServer]:
    with environment() as server:
        yield server


def tasks(server: EnvironmentServer, split: str = "train", **options: Any) -> EnvironmentTasks:
    return EnvironmentTasks("gym", server.url, split, **{**QUICK, **options})


def graded(server: EnvironmentServer, row: Row, **options: Any) -> Success | Failure:
    return grade(Environment(server.url, **{**QUICK, **options}), row)


def row_of(task: str, said: str = "ab", **more: Any) -> Row:
    """As a responses file has it."""
    state = first_state(task)
    messages = state if isinstance(state, list) else [state]
    about = {"task_id": task, "env_type": "gym", "messages": messages}
    return {**about, "response": said, **more}


# What it is asked


def test_a_conversation_is_begun_and_released(gym: EnvironmentServer) -> None:
    source = tasks(gym, ahead=1)
    assert len(source) == 3
    state = first_state("sum-2")
    assert source[1] == {
        "id": "sum-2",
        "messages": state,
        "task_id": "sum-2",
        "env_type": "gym",
        "main_query": state[-1]["content"],
        "metadata": {"split": "train"},
    }
    (made,) = gym.made
    empty = {"env_type": "default", "task_id": None, "instance_id": None}
    empty |= {"messages": {}, "params": {}}
    assert gym.calls == [
        ("get_env_profile", {**empty, "env_type": "gym", "params": {"split": "train"}}),
        ("create", {**empty, "env_type": "gym", "task_id": "sum-2", "instance_id": made}),
        ("release", {**empty, "instance_id": made}),
    ]
    assert len(made) == 32 and gym.open == {}


def test_an_answer_is_one_step(gym: EnvironmentServer) -> None:
    found = graded(gym, row_of("sum-1", "<think>so</think>ab"))
    assert found == Success({"correct": True, "reward": 1.0, "raw": 1.0})
    (made,) = gym.made
    empty = {"env_type": "default", "task_id": None, "instance_id": made}
    empty |= {"messages": {}, "params": {}}
    action = {"role": "assistant", "content": "ab"}
    assert gym.calls == [
        ("create", {**empty, "env_type": "gym", "task_id": "sum-1"}),
        ("step", {**empty, "messages": action}),
        ("evaluate", {**empty, "params": {"sparse": False}}),
        ("release", empty),
    ]


@pytest.mark.parametrize(("said", "raw", "judge"), [("", 0, 0), ("a", 0.5, 0.25), ("ab", 1, 1.5)])
def test_the_formulas(gym: EnvironmentServer, said: str, raw: float, judge: float) -> None:
    for formula, reward in (("raw", raw), ("judge", judge)):
        found = graded(gym, row_of("sum-1", said), formula=formula)
        assert found == Success({"correct": raw >= 1, "reward": reward, "raw": raw})


def test_a_state_may_be_one_message(gym: EnvironmentServer) -> None:
    gym.splits = {"train": ["one-1"]}
    assert tasks(gym)[0]["messages"] == [first_state("one-1")]
    assert isinstance(graded(gym, row_of("one-1")), Success)


def test_ids_are_texts_in_the_order_of_the_service(gym: EnvironmentServer) -> None:
    gym.splits = {"train": [7, "b", "a", 7]}
    source = tasks(gym)
    assert [each["id"] for each in source] == ["7", "b", "a", "7"]
    assert [each["id"] for each in source[1:3]] == ["b", "a"]
    assert source[-2]["id"] == "a"


def test_the_version_is_that_of_the_ids(gym: EnvironmentServer) -> None:
    source = tasks(gym)
    before = source.version()
    assert before == tasks(gym).version() != tasks(gym, "dev").version()
    gym.splits = {"train": ["sum-1"]}
    assert source.version() != before
    gym.kill()
    with pytest.raises(InputError, match="get_env_profile: no connection: "):
        source.version()


@pytest.mark.parametrize("asked", [("gym", "nothing"), ("chess", "train")])
def test_no_tasks_name_environment_split_and_url(
    gym: EnvironmentServer, asked: tuple[str, str]
) -> None:
    env_type, split = asked
    with pytest.raises(InputError) as caught:
        len(EnvironmentTasks(env_type, gym.url, split))
    assert all(repr(name) in str(caught.value) for name in asked) and gym.url in str(caught.value)


def test_some_tasks_are_begun_ahead_and_no_more(gym: EnvironmentServer) -> None:
    gym.splits = {"train": [f"sum-{n}" for n in range(30)]}
    gym.faults["create"] = [Fault(late=0.3, done=True)] * 30
    source = tasks(gym, ahead=5)
    assert [each["id"] for each in source] == gym.splits["train"]
    assert gym.most_open <= 5 and gym.counts["create"] == 30
    assert source[29]["id"] == "sum-29" and gym.counts["create"] == 30, "each is begun once"
    some = tasks(gym)[3:20:4]
    assert [each["id"] for each in some] == gym.splits["train"][3:20:4]
    assert gym.counts["create"] == 35
    assert tasks(gym)[3:5].get_example(29)["id"] == "sum-29"


# Faults

AGAIN = {
    "busy": Fault(503),
    "too many": Fault(429, headers={"Retry-After": "0.05"}),
    "another now": Fault(409),
    "no JSON": Fault(body=b"<html>"),
    "a list": Fault(body=b"[]"),
    "no data": Fault(body=b"{}"),
    "closed": Fault(closes=True),
    "done, then closed": Fault(closes=True, done=True),
    "none in time": Fault(late=1.0),
}
NOT_DONE = {"too many"}


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("endpoint", ["create", "step", "evaluate", "release"])
def test_what_passes_is_asked_again(gym: EnvironmentServer, endpoint: str, name: str) -> None:
    gym.faults[endpoint] = [AGAIN[name]] * 2
    found = graded(gym, row_of("sum-1"), timeout_s=0.5)
    if endpoint == "step" and name not in NOT_DONE:
        assert isinstance(found, Failure) and gym.counts["step"] == 1, "perhaps it was done"
    else:
        assert found == Success({"correct": True, "reward": 1.0, "raw": 1.0})
        assert gym.counts[endpoint] == 3
    until(lambda: not gym.busy)
    look_back(gym)
    assert gym.open == {}


TOLD = {
    "wrong": (Fault(400, b'{"detail": "Trace\\nback\\nUnknown env_type"}'), Reason.BAD_REQUEST,
              "HTTP 400: Unknown env_type"),
    "moved": (Fault(307, headers={"Location": "/other"}), Reason.BAD_REQUEST, "HTTP 307: {}"),
    "nothing there": (Fault(404, b""), Reason.BAD_REQUEST, "HTTP 404: nothing"),
    "broken": (Fault(500, b"<b>no\n</b>"), Reason.SERVER_ERROR, "HTTP 500: <b>no </b>; 3 attempts"),
    "many": (Fault(429), Reason.RATE_LIMITED, "HTTP 429: {}; 3 attempts"),
    "hangs": (Fault(late=1.0), Reason.TIMEOUT, "no answer within 0.3 s; 3 attempts"),
    "closes": (Fault(closes=True), Reason.DROPPED, "ServerDisconnectedError: "),
    "no JSON": (Fault(body=b"<html>"), Reason.BAD_REPLY, "the reply is no JSON object: <html>"),
    "a text": (Fault(body=b'"x"'), Reason.BAD_REPLY, 'the reply is no JSON object: "x"'),
    "surrogate": (Fault(body=b'{"data": "\\ud800"}'), Reason.BAD_REPLY, "is no JSON object"),
    "no data": (Fault(body=b"{}"), Reason.BAD_REPLY, "the reply has no object as data; have None"),
    "no state": (Fault(body=b'{"data": {"state": 1}}'), Reason.BAD_REPLY, "has no state; have 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_a_row_that_fails_says_what_was_tried(gym: EnvironmentServer, name: str) -> None:
    fault, reason, told = TOLD[name]
    gym.faults["create"] = [fault] * 3
    failed = graded(gym, row_of("sum-1"), timeout_s=0.3)
    assert isinstance(failed, Failure) and failed.reason is reason
    assert failed.detail.startswith(f"{gym.url}/create: ") and told in failed.detail
    if "attempts" in told:
        assert failed.detail.endswith(" s waited between them")


@pytest.mark.parametrize("data", ["null", "true", '"1"', "[1]", "{}", "1e999"])
def test_a_reward_is_a_number(gym: EnvironmentServer, data: str) -> None:
    gym.faults["evaluate"] = [Fault(body=f'{{"data": {data}}}'.encode())] * 3
    failed = graded(gym, row_of("sum-1"))
    assert isinstance(failed, Failure) and failed.reason is Reason.BAD_REPLY
    assert gym.open == {}


@pytest.mark.parametrize("ids", ["null", "{}", '"x"', "[null]", "[true]", "[1.5]", "[[]]"])
def test_ids_that_are_none_are_refused(gym: EnvironmentServer, ids: str) -> None:
    gym.faults["get_env_profile"] = [Fault(body=f'{{"data": {ids}}}'.encode())]
    with pytest.raises(InputError, match=r"the reply has no (list of ids|id); have"):
        len(tasks(gym))
    gym.faults["get_env_profile"] = [Fault(body=b'{"task_ids": ["a"]}')]
    assert len(tasks(gym)) == 1


@given(state=st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["state", "data", "role", "content", "info"]), inner),
))  # fmt: skip
@settings(max_examples=50)
def test_no_state_is_more_than_a_row_that_fails(state: Any, gym_of_all: EnvironmentServer) -> None:
    gym = gym_of_all
    gym.states["sum-1"] = state
    try:
        messages = tasks(gym, ahead=1, retry_wait_s=0)[0]["messages"]
    except InputError as error:
        assert "EnvironmentTasks/gym/train, task sum-1: " in str(error)
    else:
        assert messages and all(isinstance(each["content"], str) for each in messages)
    assert gym.open == {}


@pytest.fixture(scope="module")
def gym_of_all() -> Iterator[EnvironmentServer]:
    with environment() as server:
        yield server


BAD_STATES = [[], [{"role": "user"}], [{"role": 1, "content": "x"}], ["x"], {"content": "x"}]


@pytest.mark.parametrize("state", BAD_STATES)
def test_a_state_without_messages_fails_its_task_and_no_other(
    gym: EnvironmentServer, state: Any
) -> None:
    gym.states["sum-2"] = state
    source = tasks(gym)
    assert source[0]["id"] == "sum-1"
    with pytest.raises(InputError, match="task sum-2: its first state: expected messages"):
        source[1]
    assert source[2]["id"] == "sum-3" and gym.open == {}


def test_a_task_that_begins_otherwise_is_not_graded(gym: EnvironmentServer) -> None:
    gym.states["sum-1"] = [{"role": "user", "content": str(time.time())}]
    failed = graded(gym, row_of("sum-1"))
    assert isinstance(failed, Failure) and failed.reason is Reason.SCORER_ERROR
    assert "task sum-1 begins otherwise now" in failed.detail
    assert gym.open == {} and gym.counts["step"] == 0
    for lacking in ({"task_id": None}, {"env_type": ""}):
        failed = graded(gym, row_of("sum-1", **lacking))
        assert isinstance(failed, Failure) and "is of no environment" in failed.detail


def test_a_password_is_in_no_error(gym: EnvironmentServer) -> None:
    url = gym.url.replace("://", "://me:hunter22@")
    gym.faults["create"] = [Fault(400, b"no hunter22 here")]
    failed = grade(Environment(url), row_of("sum-1"))
    assert isinstance(failed, Failure) and f"{gym.url}/create: HTTP 400" in failed.detail
    assert "hunter22" not in failed.detail
    for wrong in ("ftp://me:hunter22@host", "me:hunter22@host", "http://me:hunter22@host?x=1"):
        with pytest.raises(ValueError, match="url: expected") as caught:
            Service(wrong)
        assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"url": "nowhere"}, "url: expected"),
        ({"url": None}, "url: expected"),
        ({"timeout_s": 0}, "timeout_s: expected seconds; have 0"),
        ({"timeout_s": "5"}, "timeout_s: expected seconds"),
        ({"retry_wait_s": -1}, "retry_wait_s: expected seconds"),
        ({"formula": "half"}, "formula: unknown value; expected raw, judge"),
        ({"concurrency": 0}, "concurrency: expected 1 or more"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: Row, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Environment(**{"url": "http://127.0.0.1:1", **options})
    if not options.keys() & {"formula", "concurrency"}:
        with pytest.raises(ValueError, match=wrong):
            EnvironmentTasks(**{"env_type": "gym", "url": "http://127.0.0.1:1", **options})


def test_a_service_that_is_gone_is_not_asked_for_every_task(gym: EnvironmentServer) -> None:
    gym.splits = {"train": [f"sum-{n}" for n in range(1000)]}
    source, failed = tasks(gym), 0
    assert source[0]["id"] == "sum-0"
    until(lambda: not gym.busy)
    gym.kill()
    with pytest.raises(ServiceGone, match=r"the service is gone, [0-9]+ calls in a row"):
        for index in range(1, 1000):
            try:
                source[index]
            except ServiceGone:
                raise
            except InputError as error:
                assert "no connection: " in str(error) and "3 attempts" in str(error)
                failed += 1
    assert failed < 20
    lost = graded(gym, row_of("sum-1"))
    assert isinstance(lost, Failure) and lost.reason is Reason.CONNECT


# What is open


FAULTS = st.sampled_from([
    Fault(503), Fault(500, done=True), Fault(400), Fault(body=b"x", done=True), Fault(closes=True),
    Fault(closes=True, done=True), Fault(late=0.3, done=True), Fault(late=0.3), Fault(done=True),
])  # fmt: skip
ENDPOINTS = ("create", "step", "evaluate", "release")


@given(faults=st.dictionaries(st.sampled_from(ENDPOINTS), st.lists(FAULTS, max_size=5)))
@settings(max_examples=25)
def test_whatever_fails_nothing_stays_open(
    gym_of_all: EnvironmentServer, faults: dict[str, list[Fault]]
) -> None:
    gym = gym_of_all
    gym.states.clear()
    for endpoint in ENDPOINTS:
        gym.faults[endpoint] = [*faults.get(endpoint, ())]
    grader = Environment(gym.url, timeout_s=0.2, retry_wait_s=0.001)
    for task in ("sum-1", "sum-2"):
        row = row_of(task)
        found = grade(grader, row)
        assert isinstance(found, Failure) or found.values["raw"] == reward_of([row["response"]])
    until(lambda: not gym.busy, every=0.001)
    gym.faults.clear()
    look_back(gym)
    assert gym.open == {}


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_a_service_that_comes_back_hears_what_is_released(
    gym: EnvironmentServer, aside: ThreadPoolExecutor
) -> None:
    gym.faults["evaluate"] = [Fault(late=0.2)]
    lost = aside.submit(graded, gym, row_of("sum-1"))
    until(lambda: gym.counts["evaluate"])
    gym.kill()
    failed = lost.result()
    assert isinstance(failed, Failure) and failed.reason is Reason.CONNECT
    assert len(gym.open) == 1
    gym.start()
    look_back(gym)
    assert gym.open == {}


def test_a_service_that_forgets_is_not_asked_for_ever(gym: EnvironmentServer) -> None:
    gym.faults["release"] = [Fault(500)] * 3
    assert tasks(gym, ahead=1)[0]["id"] == "sum-1"
    gym.kill(forgets=True)
    gym.start()
    gym.calls.clear()
    for _ in range(3):
        look_back(gym)
    assert gym.counts["release"] == 1


def test_what_a_process_that_lives_has_open_stays_so(
    gym: EnvironmentServer, aside: ThreadPoolExecutor
) -> None:
    gym.faults["evaluate"] = [Fault(late=0.5, done=True)]
    found = aside.submit(graded, gym, row_of("sum-1"))
    until(lambda: gym.counts["evaluate"])
    look_back(gym)
    assert isinstance(found.result(), Success) and gym.open == {}


# In the graph


MANY = {"train": [f"sum-{n}" for n in range(40)]}


@pytest.fixture
def big() -> Iterator[EnvironmentServer]:
    with environment(MANY) as server:
        yield server


def evaluation(project: Project, url: str, **options: Any) -> Path:
    """A task whose source and grader are the service."""
    project.task = "gym"
    name = "modelcall_assets.sources.environment:EnvironmentTasks"
    source = {"name": name, "as": "train", "env_type": "gym", "url": url, **QUICK}
    source |= options
    return project.write_steps(
        "evaluation",
        sources={"tasks": [source], "output_dir": "data/gym/tasks"},
        generate_response={**GENERATE, "output_path": "data/gym/responses"},
        grading={
            "grader": "environment",
            "options": {"url": url, "formula": "judge", **QUICK},
            "output_dir": "data/gym/grades",
        },
    )


def grades(project: Project) -> list[Row]:
    return pq.read_table(project.root / "data/gym/grades/train.parquet").to_pylist()


def killed_at(gym: EnvironmentServer, endpoint: str, run: Callable[[], Ended]) -> Ended:
    """What the run says whose service is killed at the tenth call."""

    def kill() -> None:
        until(lambda: gym.counts[endpoint] > 9)
        gym.kill()

    killer = Thread(target=kill)
    killer.start()
    ended = run()
    killer.join()
    return ended


def test_tasks_are_asked_and_graded_in_their_order(
    bare: Project, big: EnvironmentServer, server: RehearsalServer
) -> None:
    big.splits = {"train": [*MANY["train"], "sum-0"]}
    ended = bare.run("run-task", evaluation(bare, big.url, ahead=1))
    assert ended.code == 0, ended
    assert 1 < big.most_open <= 8, "rows are graded at once"
    rows = grades(bare)
    assert [row["task_id"] for row in rows] == big.splits["train"]
    raws = [reward_of([row["response"]]) for row in rows]
    correct, rewards = [raw >= 1 for raw in raws], [0.5 * raw + (raw >= 1) for raw in raws]
    for name, values in {"raw": raws, "correct": correct, "reward": rewards}.items():
        assert [row[name] for row in rows] == values
    made = bare.manifest("train.jsonl")
    assert made.detail["numbers"]["accuracy"] == sum(correct) / 41
    assert made.detail["numbers"]["reward_mean"] == pytest.approx(sum(rewards) / 41)
    key = dg.AssetCheckKey(bare.asset_key("responses"), "complete")
    (told,) = bare.instance.event_log_storage.get_asset_check_execution_history(key, 10)
    assert told.evaluation is not None and not looked_at_by(told.evaluation)["unique ids"]
    assert big.open == {}


def test_a_file_that_is_rejected_is_begun_once(bare: Project, big: EnvironmentServer) -> None:
    big.states = {f"sum-{n}": [] for n in range(20)}
    ended = bare.run("run-task", evaluation(bare, big.url))
    assert ended.code == 1 and "20 of 40 rows failed" in ended.err, ended
    assert big.counts["create"] == 40 and big.open == {}


def test_a_listing_does_not_wait_for_a_service_that_hangs(
    bare: Project, gym: EnvironmentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelcall_assets.sources.environment.LISTING_S", 0.1)
    file = evaluation(bare, gym.url)
    gym.faults["get_env_profile"] = [Fault(late=1.0)] * 9
    checked = bare.run("check", file)
    assert checked.code == 0 and "no answer within 0.1 s" in checked.out, checked
    assert gym.counts["create"] == 0


def test_a_service_that_is_killed_while_it_grades_costs_no_answer(
    bare: Project, big: EnvironmentServer, server: RehearsalServer
) -> None:
    file = evaluation(bare, big.url)
    ended = killed_at(big, "evaluate", lambda: bare.run("run-task", file))
    assert ended.code == 1 and "connect" in ended.err and big.url in ended.err, ended
    assert bare.statuses("scores") == {"train.jsonl": RED}
    requests = server.stats()["requests"]
    big.start()
    ended = bare.run("retry", file)
    assert ended.code == 0, ended
    assert server.stats()["requests"] == requests == 40
    assert [row["api_status"] for row in grades(bare)] == ["success"] * 40
    assert big.open == {}


def test_a_service_that_is_killed_while_tasks_begin_is_red_and_says_so(
    bare: Project, big: EnvironmentServer
) -> None:
    file = evaluation(bare, big.url)
    ended = killed_at(big, "create", lambda: bare.run("run-task", file))
    assert ended.code == 1 and big.url in ended.err, ended
    big.start()
    ended = bare.run("run-task", file)
    assert ended.code == 0 and len(grades(bare)) == 40, ended
    assert big.open == {}


@pytest.mark.parametrize(
    ("at", "number"),
    [("create", signal.SIGKILL), ("create", signal.SIGINT), ("evaluate", signal.SIGINT)],
)
def test_a_run_that_is_killed_leaves_nothing_open_for_long(
    bare: Project, big: EnvironmentServer, at: str, number: int
) -> None:
    file = evaluation(bare, big.url)
    big.faults[at] = [Fault(late=0.1, done=True)] * 40
    bare.signalled(lambda: big.counts[at] > 9, "run-task", file, number=number)
    until(lambda: not big.busy)
    assert number == signal.SIGKILL or big.open == {}
    assert big.counts[at] < 40
    ended = bare.run("run-task", file)
    assert ended.code == 0 and len(grades(bare)) == 40, ended
    assert big.open == {}


def test_both_are_killed_and_nothing_stays_open(bare: Project, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = tmp_path / "open.json"
    command = [sys.executable, environment_server.__file__, str(port), str(kept), "0.1"]
    file = evaluation(bare, f"http://127.0.0.1:{port}")

    def is_open() -> bool:
        return kept.exists() and kept.stat().st_size > len("{}")

    with subprocess.Popen(command) as service:

        def killed() -> bool:
            if is_open():
                service.kill()
            return service.poll() is not None

        bare.signalled(killed, "run-task", file)
    assert is_open()
    with subprocess.Popen(command) as service:
        ended = bare.run("run-task", file)
        assert ended.code == 0 and len(grades(bare)) == 40, ended
        service.kill()
    assert kept.read_text() == "{}"
