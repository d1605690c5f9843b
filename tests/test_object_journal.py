"""A journal whose home is an object store: what was flushed is there after any kill, once.

Most of it runs on a store in memory that can stop answering in the middle of anything.
"""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from s3_proxy import S3Proxy
from s3_server import S3Server

from modelcall_assets.errors import ModelcallError, StoreError
from modelcall_assets.journal import Journal, mirror, segments
from modelcall_assets.journal.lines import Address, Entry
from modelcall_assets.journal.mirror import journal_files, open_journal, remove
from modelcall_assets.records import StoreOptions
from modelcall_assets.storage.places import Place, Stores

KEY = "0" * 32
NEVER = 10**9


class ShakyStore(MemoryFileSystem):
    """In memory. After `calls_left` calls it does not answer any more; `meanwhile` happens before
    one of them."""

    protocol = "shaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls_left: ClassVar[int] = NEVER
    meanwhile: ClassVar[tuple[int, Callable[[], None]] | None] = None

    def _call(self) -> None:
        if ShakyStore.calls_left <= 0:
            raise OSError("the store is gone")
        ShakyStore.calls_left -= 1
        if ShakyStore.meanwhile is not None:
            calls, what = ShakyStore.meanwhile
            ShakyStore.meanwhile = (calls - 1, what) if calls else None
            if not calls:
                what()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._call()
        super().pipe_file(path, value, mode, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self._call()
        return super().cat_file(path, *args, **kwargs)

    def rm_file(self, path: str) -> None:
        self._call()
        super().rm_file(path)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._call()
        return super().find(path, *args, **kwargs)

    @classmethod
    def age(cls, days: float) -> None:
        for file in cls.store.values():
            file.created -= dt.timedelta(days=days)


STORES = Stores([StoreOptions("shaky", "shaky://", f"{__name__}:ShakyStore", {})])


def entry(text: str) -> Entry:
    return Entry(Address(KEY), 0, 200, b'{"n":"%b"}' % text.encode(), "h", 1, 1, "t")


def texts(journal: Journal) -> list[str]:
    """All replies that the journal finds."""
    return [d.entries[0].body[6:-2].decode() for d in journal.dialogues(Address(KEY))]


@dataclass
class Machine:
    scratch: Path
    kept: set[str] = field(default_factory=set)
    """Replies in files of this machine."""


@dataclass(eq=False)
class Run:
    machine: Machine
    journal: Journal
    said: set[str] = field(default_factory=set)


a_machine = st.integers(0, 5)
a_run = st.integers(0, 5)
some_are_open = precondition(lambda self: self.open)


class Machines(RuleBasedStateMachine):
    """One to three machines work on one journal, crash at any moment and may be lost."""

    def __init__(self) -> None:
        super().__init__()
        ShakyStore.store.clear()
        ShakyStore.pseudo_dirs[:] = [""]
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.place: Place = STORES.place("shaky://b/journal")
        self.count = 0
        self.machines: list[Machine] = []
        self.open: list[Run] = []
        self.safe: set[str] = set()
        """Replies that the store was told of."""
        self.all: set[str] = set()
        self.may_repeat = False
        """A machine that has packed and died brings what another one may have packed meanwhile."""

    def teardown(self) -> None:
        try:
            for run in [*self.open]:
                self.crash(run)
            self.check(self.new_machine())
        finally:
            shutil.rmtree(self.folder)

    def number(self) -> int:
        self.count += 1
        return self.count

    def new_machine(self) -> Machine:
        return Machine(self.folder / str(self.number()))

    def machine(self, index: int) -> Machine:
        return self.machines[index % len(self.machines)]

    def run(self, index: int) -> Run:
        return self.open[index % len(self.open)]

    def opened(self, machine: Machine, **options: Any) -> Journal:
        run_id = f"run{self.number():09d}"
        return open_journal(self.place, machine.scratch, run_id, flush_s=0, **options)

    def begin(self, machine: Machine) -> Run:
        run = Run(machine, self.opened(machine))
        self.compare(texts(run.journal), machine)
        if all(other.machine is not machine for other in self.open):
            self.safe |= machine.kept
        self.open.append(run)
        return run

    def append(self, run: Run) -> None:
        text = f"r{self.number()}"
        run.journal.append(entry(text))
        run.said.add(text)
        run.machine.kept.add(text)
        self.all.add(text)

    def tell(self, run: Run, what: str) -> None:
        call: Callable[..., None] = getattr(run.journal, what)
        call(*(["v"] if what == "seal" else []))
        self.safe |= run.said
        if what == "close":
            self.open.remove(run)

    def crash(self, run: Run) -> None:
        """What is on the disk stays; nothing more is said to the store."""
        Journal.close(run.journal)
        self.open.remove(run)

    def whole_run(self, machine: Machine) -> None:
        run = self.begin(machine)
        self.append(run)
        self.tell(run, "seal")
        self.tell(run, "close")

    def check(self, machine: Machine) -> None:
        with self.opened(machine, read_only=True) as journal:
            self.compare(texts(journal), machine)

    def compare(self, seen: list[str], machine: Machine) -> None:
        assert self.may_repeat or len(seen) == len(set(seen)), "a reply is there twice"
        assert self.safe | machine.kept <= set(seen), "a reply is lost"
        assert set(seen) <= self.all

    @contextmanager
    def answering(self, calls: int) -> Iterator[None]:
        """So often, then no more."""
        ShakyStore.calls_left = calls
        try:
            yield
        except ModelcallError:
            pass
        finally:
            ShakyStore.calls_left = NEVER

    @initialize(count=st.integers(1, 3))
    def some_machines(self, count: int) -> None:
        self.machines = [self.new_machine() for _ in range(count)]

    @rule(index=a_machine)
    def begins(self, index: int) -> None:
        if len(self.open) < 4:
            self.begin(self.machine(index))

    @some_are_open
    @rule(index=a_run, flushes=st.integers(0, 10))
    def works(self, index: int, flushes: int) -> None:
        """Perhaps more than it tells the store."""
        run = self.run(index)
        for _ in range(flushes):
            self.append(run)
            self.tell(run, "sync")
        self.append(run)

    @some_are_open
    @rule(index=a_run, what=st.sampled_from(["sync", "seal", "close"]))
    def tells(self, index: int, what: str) -> None:
        self.tell(self.run(index), what)

    @rule(index=a_machine, runs=st.integers(1, 4))
    def whole_runs(self, index: int, runs: int) -> None:
        for _ in range(runs):
            self.whole_run(self.machine(index))
        if not self.open:
            self.nothing_is_left_over()

    def nothing_is_left_over(self) -> None:
        names = {path.rpartition("/")[2] for path in ShakyStore.store}
        in_parts = {name.partition("@")[0] for name in names if "@" in name}
        assert not in_parts & names, "parts of a whole segment"
        if not in_parts:
            assert len(names) <= segments.FEW_SEGMENTS, "segments that were packed"

    @some_are_open
    @rule(
        index=a_run,
        what=st.sampled_from(["sync", "seal", "close"]),
        calls=st.integers(0, 9),
        lost=st.booleans(),
    )
    def crashes_in(self, index: int, what: str, calls: int, lost: bool) -> None:
        run = self.run(index)
        self.append(run)
        self.may_repeat |= what == "seal"
        with self.answering(calls):
            self.tell(run, what)
        if what != "close":
            self.crash(run)
        elif run in self.open:
            self.open.remove(run)
        if lost:
            self.lose(run.machine)

    @rule(index=a_machine, calls=st.integers(0, 8))
    def crashes_while_it_begins(self, index: int, calls: int) -> None:
        with self.answering(calls):
            Journal.close(self.opened(self.machine(index)))

    @rule(index=a_machine, other=a_machine, calls=st.integers(0, 6), runs=st.integers(1, 4))
    def begins_while_others_work(self, index: int, other: int, calls: int, runs: int) -> None:
        def work() -> None:
            if self.open:
                run = self.run(other)
                for _ in range(4):
                    self.append(run)
                    self.tell(run, "sync")
            for _ in range(runs):
                self.whole_run(self.machine(other))

        machine = self.machine(index)
        if machine is self.machine(other) or any(run.machine is machine for run in self.open):
            return
        known = self.safe | machine.kept
        ShakyStore.meanwhile = calls, work
        with self.opened(machine) as journal:
            ShakyStore.meanwhile = None
            assert known <= set(texts(journal)), "a reply is lost"

    @rule(index=a_machine)
    def is_lost(self, index: int) -> None:
        self.lose(self.machine(index))

    def lose(self, machine: Machine) -> None:
        for run in [run for run in self.open if run.machine is machine]:
            self.crash(run)
        shutil.rmtree(machine.scratch, ignore_errors=True)
        machine.kept.clear()

    @precondition(lambda self: not self.open)
    @rule()
    def a_long_time_passes(self) -> None:
        """A machine that comes back after that is as good as lost."""
        ShakyStore.age(8)
        for machine in self.machines:
            machine.kept.clear()

    @rule(index=a_machine)
    def looks(self, index: int) -> None:
        self.check(self.machine(index))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge and pack after a few flushes and runs."""
    monkeypatch.setattr(mirror, "MERGED_PARTS", 3)
    monkeypatch.setattr(segments, "FEW_SEGMENTS", 3)


Machines.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
test_machines = pytest.mark.usefixtures("soon")(Machines.TestCase)


@dataclass
class Swift:
    """A journal in a real store, behind a proxy."""

    proxy: S3Proxy
    place: Place
    folder: Path
    count: int = 0

    def opened(self, machine: str, **options: Any) -> Journal:
        self.count += 1
        run_id = f"run{self.count:09d}"
        return open_journal(self.place, self.folder / machine, run_id, flush_s=0, **options)

    def a_run(self, machine: str) -> None:
        with self.opened(machine) as journal:
            self.append(journal)
            journal.seal("v")

    def append(self, journal: Journal) -> None:
        self.count += 1
        journal.append(entry(f"r{self.count}"))

    def seen(self) -> list[str]:
        """By a machine that was never there."""
        self.count += 1
        with self.opened(f"new{self.count}", read_only=True) as journal:
            return texts(journal)

    def objects(self) -> list[str]:
        return [info.key_path for info in journal_files(self.place)]


@pytest.fixture
def swift(s3_server: S3Server, bucket: str, tmp_path: Path) -> Iterator[Swift]:
    config = {**s3_server.storage_options["config_kwargs"], "retries": {"total_max_attempts": 1}}
    with S3Proxy(s3_server) as proxy:
        options = {**s3_server.storage_options, "config_kwargs": config}
        options["endpoint_url"] = proxy.endpoint
        stores = Stores([StoreOptions("lab", "s3://", "s3", options)])
        yield Swift(proxy, stores.place(f"s3://{bucket}/journal"), tmp_path)


def test_a_run_of_any_length_has_few_objects(swift: Swift) -> None:
    with swift.opened("one") as journal:
        for _ in range(26):
            swift.append(journal)
            journal.sync()
            assert len(swift.objects()) <= 6, "two for each power of three"
        assert len(swift.seen()) == 26
    assert len(swift.objects()) == 1
    assert len(swift.seen()) == 26


@pytest.mark.parametrize("deleted", [0, 1, 2])
def test_a_kill_while_parts_are_merged(swift: Swift, deleted: int) -> None:
    journal = swift.opened("one")
    for _ in range(2):
        swift.append(journal)
        journal.sync()
    swift.append(journal)
    swift.proxy.on("DELETE", "@", refuse=(503, "SlowDown"))
    swift.proxy.on("DELETE", "@", times=deleted)
    with pytest.raises(StoreError, match="cannot be deleted"):
        journal.sync()
    Journal.close(journal)
    assert len(swift.objects()) == 4 - deleted
    assert len(swift.seen()) == 3
    swift.proxy.clear()
    swift.opened("one").close()
    assert len(swift.objects()) == 1
    assert len(swift.seen()) == 3


def test_what_another_machine_writes_is_not_packed_before_it_has_ended(swift: Swift) -> None:
    with swift.opened("one") as journal:
        swift.append(journal)
        journal.sync()
        for _ in range(4):
            swift.a_run("two")
        assert len(swift.objects()) == 5
        swift.append(journal)
        journal.sync()
        assert len(swift.seen()) == 6
    swift.a_run("two")
    (packed,) = swift.objects()
    assert packed.endswith(".jsonl.zst")
    assert len(swift.seen()) == 7


def test_a_kill_before_what_was_packed_is_deleted_brings_nothing_back(swift: Swift) -> None:
    """Not even what a fresh start had hidden."""
    for _ in range(2):
        swift.a_run("one")
    journal = swift.opened("one", fresh=True)
    swift.append(journal)
    swift.proxy.on("DELETE", refuse=(503, "SlowDown"))
    with pytest.raises(StoreError, match="cannot be deleted"):
        journal.seal("v")
    Journal.close(journal)
    swift.proxy.clear()
    assert len(swift.objects()) == 3, "two, and what packs them"
    assert len(swift.seen()) == 1
    for _ in range(4):
        swift.a_run("two")
    assert len(swift.seen()) == 5
    assert len(swift.objects()) <= segments.FEW_SEGMENTS


def test_a_journal_below_another_one_is_its_own(swift: Swift) -> None:
    """As where a name is that of a file and of a folder, which stores allow."""
    swift.a_run("one")
    above, swift.place = swift.place, swift.place / "b.jsonl"
    for _ in range(2):
        swift.a_run("one")
    below, swift.place = swift.place, above
    assert (len(swift.objects()), len(swift.seen())) == (1, 1)
    assert remove(above, swift.folder / "one")
    assert swift.objects() == []
    swift.place = below
    assert len(swift.seen()) == 2


def test_a_straggler_of_a_run_that_has_ended_does_nothing(swift: Swift) -> None:
    """As one that waited for the store when the run gave it up."""
    held = swift.proxy.on("PUT", "@", times=1, hold=True)
    journal = swift.opened("one")
    swift.append(journal)
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(journal.sync)
        assert held.reached.wait(60)
        swift.append(journal)
        sealed, late = pool.submit(journal.seal, "v"), pool.submit(journal.sync)
        held.release()
        for each in (waiting, sealed, late):
            each.result()
    journal.close()
    journal.sync()
    assert len(swift.objects()) == 1
    assert len(swift.seen()) == 2
