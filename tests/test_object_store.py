"""A real store that answers late, by halves, twice or not at all: what is published and paid."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from botocore.client import BaseClient
from project import TASK, Project, some_rows, until
from s3_proxy import S3Proxy
from s3_server import S3Server

from modelcall_assets.errors import InputError, ModelcallError, StoreError
from modelcall_assets.records import StoreOptions
from modelcall_assets.storage import files, publishing
from modelcall_assets.storage.files import (
    delete,
    file_digest,
    open_input,
    publish,
    read_bytes,
    write_bytes,
)
from modelcall_assets.storage.listing import exists, left_overs, list_files, list_page, stat_file
from modelcall_assets.storage.places import RemotePath, Stores
from modelcall_assets.storage.publishing import Check, claimed

PART = 5 << 20
"""The least that S3 takes for a part that is not the last."""
NEW = b"n" * (2 * PART + 1)


def stores(server: S3Server, **changes: Any) -> Stores:
    """At once, and with few attempts, so that what is in vain ends soon."""
    config = {**server.storage_options["config_kwargs"], "retries": {"total_max_attempts": 2}}
    options = {**server.storage_options, "config_kwargs": config, **changes}
    return Stores([StoreOptions("lab", "s3://", "s3", options)])


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server) as running:
        yield running


@pytest.fixture
def behind(proxy: S3Proxy, s3_server: S3Server, bucket: str) -> RemotePath:
    """A place that is reached through the proxy."""
    return place_of(stores(s3_server, endpoint_url=proxy.endpoint), f"s3://{bucket}/out/a.bin")


@pytest.fixture
def place(s3_server: S3Server, bucket: str) -> RemotePath:
    """The same place, without."""
    return place_of(stores(s3_server), f"s3://{bucket}/out/a.bin")


def impatient(server: S3Server, **changes: Any) -> Stores:
    """Every request is sent once."""
    config = {**server.storage_options["config_kwargs"], "retries": {"total_max_attempts": 1}}
    return stores(server, config_kwargs=config, **changes)


@pytest.fixture
def client(s3_server: S3Server) -> Iterator[BaseClient]:
    with closing(s3_server.client()) as made:
        yield made


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WRITE_BYTES", PART)


def place_of(known: Stores, uri: str) -> RemotePath:
    made = known.place(uri)
    assert isinstance(made, RemotePath)
    return made


def write(place: RemotePath, content: bytes = NEW) -> None:
    with publish(place) as file:
        for start in range(0, len(content), 1 << 20):
            file.write(content[start : start + (1 << 20)])


def read(place: RemotePath) -> bytes:
    with open_input(place) as file:
        return file.read()


def uploads(client: BaseClient, bucket: str) -> list[Any]:
    return client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])


@contextmanager
def in_thread(what: Callable[[], Any]) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(what)


@pytest.mark.usefixtures("small_parts")
class TestFiles:
    @pytest.mark.parametrize("size", [1, PART, PART + 1, 2 * PART, 2 * PART + 1])
    def test_any_size_is_read_as_it_was_written(self, place: RemotePath, size: int) -> None:
        write(place, NEW[:size])
        assert read(place) == NEW[:size]
        assert stat_file(place).size == size
        with publish(place.with_name("same")) as same:
            same.write(NEW[:size])
            assert file_digest(place) == same.digest

    def test_an_empty_file_is_a_file(self, place: RemotePath) -> None:
        with publish(place):
            pass
        assert (read(place), stat_file(place).size, exists(place)) == (b"", 0, True)

    @pytest.mark.parametrize("step", ["partNumber=2", "uploadId=[^&]*$"])
    def test_a_reader_sees_the_old_one_until_the_new_one_is_whole(
        self, behind: RemotePath, place: RemotePath, proxy: S3Proxy, step: str
    ) -> None:
        fresh = behind.with_name("fresh.bin")
        write_bytes(place, b"old")
        for target in (behind, fresh):
            held = proxy.on("", query=step, times=1, hold=True)
            with in_thread(lambda target=target: write(target)) as writing:
                assert held.reached.wait(30)
                assert read(place) == b"old" if target is behind else not exists(fresh)
                assert [info.key_path for info in list_files(place.parent)] == ["a.bin"]
                held.release()
                writing.result()
            assert read(target) == NEW
            place = place if target is fresh else behind
            write_bytes(place, b"old")

    @pytest.mark.parametrize(
        ("method", "query"),
        [("POST", "^uploads"), ("PUT", "partNumber=1"), ("PUT", "partNumber=3"), ("POST", "Id=")],
    )
    @pytest.mark.parametrize("fate", ["lose", "lose_reply"])
    def test_a_request_or_reply_that_is_lost_changes_nothing(
        self, behind: RemotePath, proxy: S3Proxy, method: str, query: str, fate: str
    ) -> None:
        lost = proxy.on(method, query=query, times=1, **{fate: True})
        write(behind)
        assert lost.met == 1
        assert read(behind) == NEW

    def test_an_answer_that_breaks_off_is_read_again(
        self, behind: RemotePath, place: RemotePath, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("modelcall_assets.storage.places._PAUSE_S", 0.01)
        write(place)
        for look in (read, read_bytes):
            broken = proxy.on("GET", "a.bin", times=2, cut_reply=True)
            assert look(behind) == NEW
            assert broken.met == 2
        broken = proxy.on("GET", "a.bin", cut_reply=True)
        with pytest.raises(InputError, match=r"cannot be read \(bucket .*, key out/a.bin\)"):
            read(behind)
        with pytest.raises(StoreError, match=r"cannot be read \(bucket .*, key out/a.bin\)"):
            read_bytes(behind)
        assert broken.met < 10

    def test_a_reader_is_told_when_the_file_changes_under_it(self, place: RemotePath) -> None:
        write(place, b"x" * (files.READ_BYTES + PART))
        with open_input(place) as file:
            file.read(100)
            write_bytes(place, b"y" * (files.READ_BYTES + PART))
            with pytest.raises(InputError, match=r"a\.bin: cannot be read.*it has changed"):
                file.read()

    def test_a_store_that_comes_back_soon_is_waited_for(
        self, s3_server: S3Server, bucket: str, proxy: S3Proxy
    ) -> None:
        """The server is killed with a part on its way."""
        config = {**s3_server.storage_options["config_kwargs"], "retries": {"mode": "standard"}}
        config["retries"]["total_max_attempts"] = 8
        patient = stores(s3_server, endpoint_url=proxy.endpoint, config_kwargs=config)
        behind = place_of(patient, f"s3://{bucket}/out/a.bin")
        held = proxy.on("PUT", query="partNumber=2", times=1, hold=True)
        with in_thread(lambda: write(behind)) as writing:
            assert held.reached.wait(30)
            s3_server.kill()
            try:
                held.release()
                until(lambda: proxy.count("PUT", query="partNumber=2") > 1)
            finally:
                s3_server.start()
            writing.result()
        assert read(behind) == NEW

    def test_what_a_dead_store_keeps_of_an_upload_can_be_deleted(
        self, behind: RemotePath, place: RemotePath, proxy: S3Proxy, client: BaseClient, bucket: str
    ) -> None:
        """Two of one key, and one that somebody is writing."""
        proxy.on("PUT", query="partNumber=2", refuse=(503, "SlowDown"))
        proxy.on("DELETE", refuse=(503, "SlowDown"))
        for _ in range(2):
            with pytest.raises(
                StoreError, match=r"SlowDown.*check whether the store is overloaded"
            ):
                write(behind)
        proxy.clear()
        now = time.time()
        assert list(left_overs(place.parent, now - 60)) == []
        found = list(left_overs(place.parent, now + 60))
        assert len({each.name for each in found}) == 2
        assert [each.size for each in found] == [PART, PART]
        assert list(left_overs(place.parent.parent, now + 60)) != []
        assert list(left_overs(place.parent / "a", now + 60)) == []
        for each in found * 2:
            each.delete()
        assert uploads(client, bucket) == []


QUICK = {"poll_s": 0.02, "stale_s": 2.5}


HOLDER = """
import sys
from modelcall_assets.records import StoreOptions
from modelcall_assets.storage.publishing import claimed
from modelcall_assets.storage.places import Stores
options = eval(sys.stdin.readline())
with claimed(Stores([StoreOptions("lab", "s3://", "s3", options)]).place(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


class TestClaims:
    @pytest.fixture
    def claim(self, place: RemotePath) -> RemotePath:
        return place.parent / "claims/scores/a.jsonl"

    def test_of_many_at_the_same_time_one_holds_it(
        self, s3_server: S3Server, claim: RemotePath
    ) -> None:
        """Each has its own connections, as processes do."""
        together, inside, most = threading.Barrier(16), [0], [0]

        def work(_: int) -> None:
            own = place_of(stores(s3_server), str(claim))
            together.wait()
            with claimed(own, poll_s=0.2) as check:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                check()
                assert not exists(own / "x")
                inside[0] -= 1

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))
        assert most == [1]
        assert publishing.claims(claim) == []

    def test_who_holds_it_for_long_keeps_it(self, claim: RemotePath) -> None:
        """The other one looks for three times as long as a dead one's claim stands."""
        entered = threading.Event()

        def wait() -> None:
            with claimed(claim, **QUICK):
                entered.set()

        holding = ExitStack()
        check = holding.enter_context(claimed(claim, **QUICK))
        with in_thread(wait) as waiting:
            begun = time.monotonic()
            until(lambda: time.monotonic() - begun > 3 * QUICK["stale_s"], every=0.1)
            check()
            assert not entered.is_set()
            holding.close()
            waiting.result()

    def test_that_of_a_process_that_was_killed_is_taken_over(
        self, s3_server: S3Server, claim: RemotePath
    ) -> None:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(claim)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdin is not None and holder.stdout is not None
        with holder:
            print(s3_server.storage_options, file=holder.stdin, flush=True)
            assert holder.stdout.readline() == "held\n"
            assert len(publishing.claims(claim)) == 1
            holder.send_signal(signal.SIGKILL)
        with claimed(claim, **QUICK) as check:
            check()
        assert publishing.claims(claim) == []

    def test_who_was_cut_off_from_the_store_holds_it_no_more(
        self, proxy: S3Proxy, behind: RemotePath, claim: RemotePath
    ) -> None:
        own = place_of_same_store(behind, claim)
        with claimed(own, **QUICK) as check:
            check()
            proxy.on("PUT", "claims/", refuse=(503, "SlowDown"))
            proxy.on("DELETE", "claims/", refuse=(503, "SlowDown"))
            until(lambda: not holds(check))
            with claimed(claim, **QUICK) as other:
                other()
                proxy.clear()
                with pytest.raises(StoreError, match="another run may hold it now"):
                    check()

    def test_a_store_that_cannot_write_on_a_condition_will_do(
        self, proxy: S3Proxy, behind: RemotePath, claim: RemotePath
    ) -> None:
        conditional = proxy.on("", conditional=True, refuse=(501, "NotImplemented"))
        with claimed(place_of_same_store(behind, claim)) as check:
            write(behind)
            check()
        assert conditional.met == 0
        assert read_bytes(behind) == NEW


def place_of_same_store(place: RemotePath, other: RemotePath) -> RemotePath:
    return RemotePath(other.uri, place.store)


def holds(check: Check) -> bool:
    try:
        check()
    except StoreError:
        return False
    return True


class TestListing:
    def test_of_several_pages_is_complete_and_in_order(
        self, s3_server: S3Server, bucket: str, client: BaseClient
    ) -> None:
        names = [f"{n % 3}/{n:03}.jsonl" for n in range(60)]
        names += [
            "a b/é.jsonl",
            "a+b/%2C,=.parquet",
            "Z.jsonl",
            "雪/*[x]?.jsonl",
            "z/" * 50 + "z.jsonl",
        ]
        others = ["notes.txt", ".x/a.jsonl", "b/.y.jsonl", "own/a.jsonl", "own/deep/a.jsonl"]
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda name: client.put_object(Bucket=bucket, Key=f"in/{name}", Body=b"{}"),
                    [*names, *others, "own.jsonl"],
                )
            )
        paged = stores(s3_server, s3_additional_kwargs={"MaxKeys": 10})
        folder = place_of(paged, f"s3://{bucket}/in")
        found = list_page(folder, exclude=[folder / "own"])[0]
        assert [info.key_path for info in found] == sorted([*names, "own.jsonl"])
        assert [str(info.place) for info in found] == [f"{folder}/{i.key_path}" for i in found]
        assert {info.size for info in found} == {2}
        assert all(read_bytes(info.place) == b"{}" for info in found[-9:])
        for info in found[-9:]:
            assert stat_file(info.place).version == info.version
        whole = list_page(place_of(paged, f"s3://{bucket}"))[0]
        assert [info.key_path for info in whole][-1] == f"in/{max(names)}"
        assert len(list_page(folder, "*.parquet")[0]) == 1

    def test_the_version_is_that_of_the_content(self, place: RemotePath) -> None:
        versions: list[str] = []
        for content in (b"1", b"2", b"1"):
            write_bytes(place.with_name("a.jsonl"), content)
            (listed,) = list_page(place.parent)[0]
            assert listed.version == stat_file(listed.place).version
            assert abs(listed.modified - time.time()) < 60
            versions.append(listed.version)
        assert versions[0] == versions[2] != versions[1]


SECRET = "a-wrong-secret-4711"
KEYS = "check the access key, the secret and what they may do with this bucket"
EVERYTHING: dict[str, Callable[[RemotePath], object]] = {
    "list": lambda place: list_page(place.parent)[0],
    "stat": stat_file,
    "read": read,
    "read whole": read_bytes,
    "exists": exists,
    "write": lambda place: write_bytes(place, b"x"),
    "publish": lambda place: write(place, b"x"),
    "publish much": write,
    "delete": delete,
    "claim": lambda place: claimed(place / "claim").__enter__(),
    "look for uploads": lambda place: list(left_overs(place.parent, time.time())),
}


@pytest.mark.usefixtures("small_parts")
class TestTrouble:
    """Whatever is done, it says the place, bucket, key and what to check, and no secret."""

    def told(self, place: RemotePath, *but: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in EVERYTHING.keys() - {*but}:
            with pytest.raises((InputError, StoreError)) as raised:
                EVERYTHING[name](place)
            text = found[name] = str(raised.value)
            bucket, _, key = place.key.partition("/")
            assert text.startswith(str(place.parent)) and f"(bucket {bucket}" in text, name
            assert (f"key {key.rpartition('/')[0]}" in text) and "; check " in text, name
            assert "\n" not in text and len(text) < 800, name
            self.assert_no_secret(raised.value)
        return found

    def assert_no_secret(self, error: BaseException | None) -> None:
        while error is not None:
            assert SECRET not in f"{error!s}{error!r}{error.args}"
            error = error.__cause__ or error.__context__

    @pytest.fixture(autouse=True)
    def nothing_is_logged(self, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
        caplog.set_level("INFO")
        yield
        assert SECRET not in caplog.text

    def test_with_a_wrong_secret_says_to_check_the_keys(
        self, s3_server: S3Server, bucket: str
    ) -> None:
        wrong = place_of(impatient(s3_server, secret=SECRET), f"s3://{bucket}/in/a.jsonl")
        for name, text in self.told(wrong).items():
            assert KEYS in text, name

    def test_with_an_unknown_key_says_to_check_the_keys(
        self, s3_server: S3Server, bucket: str
    ) -> None:
        wrong = impatient(s3_server, key="nobody", secret=SECRET)
        for name, text in self.told(place_of(wrong, f"s3://{bucket}/in/a.jsonl")).items():
            assert KEYS in text, name

    def test_with_a_bucket_that_is_not_there_says_so(self, s3_server: S3Server) -> None:
        nowhere = place_of(impatient(s3_server), "s3://there-is-none/in/a.jsonl")
        for name, text in self.told(nowhere, "exists", "delete", "read", "stat").items():
            assert "NoSuchBucket" in text and "check the name of the bucket" in text, name
        delete(nowhere)
        assert not exists(nowhere)
        for look in (read, stat_file):
            with pytest.raises(InputError, match="check the name of the bucket"):
                look(nowhere)

    def test_a_name_that_no_bucket_can_have(self, s3_server: S3Server) -> None:
        wrong = place_of(impatient(s3_server), "s3://No_Buc!ket/in/a.jsonl")
        for name, text in self.told(wrong).items():
            assert "check the name of the bucket" in text, name

    @pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no.such.host.invalid"])
    def test_with_a_dead_endpoint_says_to_check_the_network(
        self, s3_server: S3Server, bucket: str, endpoint: str
    ) -> None:
        dead = impatient(s3_server, secret=SECRET, endpoint_url=endpoint)
        place = place_of(dead, f"s3://{bucket}/in/a.jsonl")
        for name, text in self.told(place).items():
            assert "check the network, and the store's endpoint and region" in text, name

    @pytest.mark.parametrize(
        ("status", "code", "check"),
        [
            (403, "AccessDenied", KEYS),
            (403, "RequestTimeTooSkewed", "the clock of this machine"),
            (400, "ExpiredToken", "check the session token"),
            (503, "SlowDown", "check whether the store is overloaded"),
            (507, "QuotaExceeded", "check the quota of the bucket"),
        ],
    )
    def test_what_a_store_refuses(
        self, s3_server: S3Server, proxy: S3Proxy, status: int, code: str, check: str
    ) -> None:
        """The answer to a HEAD has no code; others have."""
        proxy.on("", refuse=(status, code))
        known = impatient(s3_server, endpoint_url=proxy.endpoint, secret=SECRET)
        behind = place_of(known, "s3://any/in/a.jsonl")
        heads = ("stat", "read", "exists")
        for name, text in self.told(behind).items():
            if name in heads:
                assert f"{status}: " in text, name
            else:
                assert f"{code}: " in text and check in text, name

    def test_a_clock_that_is_wrong(
        self, place: RemotePath, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from botocore import auth

        now = auth.get_current_datetime
        monkeypatch.setattr(auth, "get_current_datetime", lambda: now().replace(year=2031))
        told = self.told(place)
        assert "RequestTimeTooSkewed" in told["list"], told["list"]
        for name, text in told.items():
            assert "the clock of this machine" in text, name

    def test_with_a_file_that_is_not_there_says_so(self, place: RemotePath) -> None:
        for look in (stat_file, read):
            with pytest.raises(InputError, match=r"out/a.bin: not found; correct the path"):
                look(place)
        with pytest.raises(InputError, match=r"/out: not found; correct the path"):
            list_page(place.parent)
        with pytest.raises(FileNotFoundError):
            read_bytes(place)
        assert not exists(place)
        delete(place)

    def test_no_keys_at_all(
        self, s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "nothing"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        nobody = place_of(impatient(s3_server, key=None, secret=None), f"s3://{bucket}/in/a.jsonl")
        for name, text in self.told(nobody).items():
            assert "check the keys: AWS_ACCESS_KEY_ID" in text, name


def test_what_a_reader_does_wrong_is_its_own(place: RemotePath) -> None:
    """Only what the store raises is told as the store's."""
    write_bytes(place, b"x")
    for error in (ValueError("mine"), OSError("mine"), ModelcallError("mine")):
        with pytest.raises(type(error), match="mine") as raised, open_input(place):
            raise error
        assert raised.value is error


def test_a_run_with_nothing_to_do_costs_a_store_listings_however_many_files_there_are(
    project: Project, s3_server: S3Server, bucket: str, proxy: S3Proxy
) -> None:
    project.write_task_in_store(s3_server, bucket, proxy.endpoint)
    asked: list[Counter[str]] = []
    for count in (5, 15):
        for number in range(count):
            project.write_input(f"{number:02}.jsonl", some_rows(1, f"file {number}"))
        assert project.run("run-task", TASK).code == 0
        proxy.clear()
        again = project.run("run-task", TASK)
        assert (again.code, "nothing to do" in again.out) == (0, True), again
        asked.append(Counter(f"{call.method} {call.key}" for call in proxy.calls))
    assert asked[0] == asked[1], asked
