"""Which texts are left out as duplicates: by whom, over runs, crashes and processes."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.stages import duplicates
from modelcall_assets.stages.duplicates import EXACT, NEAR, Duplicates, forget
from modelcall_assets.transforms import texts
from modelcall_assets.transforms.texts import ToolError, bands, signature, similarity

THRESHOLD = 0.8
PARTITIONS = "abc"
Inputs = dict[str, list[int]]

PLACES = st.integers(0, 5)
"""Texts on a line: at a threshold of 0.8 only neighbours are near duplicates."""
ROWS = st.lists(PLACES, max_size=8)
INPUTS = st.fixed_dictionaries(dict.fromkeys(PARTITIONS, ROWS))


def digest(text: object) -> bytes:
    return blake2b(str(text).encode(), digest_size=16).digest()


def placed(place: int) -> bytes:
    """The signature of a text on the line: 16 of 128 words differ from its neighbour's."""
    return b"".join(int(word < 16 * place).to_bytes(4, "little") for word in range(128))


def work(
    path: Path,
    partition: str,
    places: Sequence[int],
    near: float | None = None,
    *,
    at_once: int = 3,
    crash: bool = False,
) -> list[str | None]:
    texts = [(digest(place), None if near is None else placed(place)) for place in places]
    with Duplicates(path, partition, near) as index:
        found = [
            rule
            for start in range(0, len(texts), at_once)
            for rule in index.rules(texts[start : start + at_once])
        ]
        if not crash:
            index.finish()
    return found


def kept(places: Sequence[int], rules: Sequence[str | None]) -> list[int]:
    return [place for place, rule in zip(places, rules, strict=True) if rule is None]


@contextmanager
def new_index() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder) / "state" / "duplicates.sqlite"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "duplicates.sqlite"


class Model:
    """What the index should say, from the words of its contract."""

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._kept: dict[str, set[int]] = {}

    def work(self, partition: str, places: Sequence[int], *, crash: bool) -> list[str | None]:
        before = self._kept.pop(partition, set())
        others = set[int]().union(*self._kept.values())
        own: set[int] = set()
        rules: list[str | None] = []
        for place in places:
            rules.append(self._rule(place, others | own))
            if rules[-1] is None:
                own.add(place)
        self._kept[partition] = own | before if crash else own
        return rules

    def forget(self, partition: str) -> None:
        self._kept.pop(partition, None)

    def _rule(self, place: int, there: set[int]) -> str | None:
        if place in there:
            return EXACT
        return NEAR if any(abs(place - other) <= self._reach for other in there) else None


class ExactMachine(RuleBasedStateMachine):
    near: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        self._path = Path(self._folder.name) / "duplicates.sqlite"
        self._model = Model(reach=0 if self.near is None else 1)
        self._inputs: Inputs = {name: [] for name in PARTITIONS}

    @rule(partition=st.sampled_from(PARTITIONS), places=ROWS, at_once=st.integers(1, 4))
    def runs_with_a_new_input(self, partition: str, places: list[int], at_once: int) -> None:
        self._inputs[partition] = places
        self._run(partition, places, at_once=at_once)

    @rule(partition=st.sampled_from(PARTITIONS))
    def runs_again(self, partition: str) -> None:
        self._run(partition, self._inputs[partition])
        again = self._run(partition, self._inputs[partition])
        assert again == self._run(partition, self._inputs[partition])

    @rule(partition=st.sampled_from(PARTITIONS), places=ROWS)
    def crashes(self, partition: str, places: list[int]) -> None:
        self._run(partition, places, crash=True)

    @rule(partition=st.sampled_from(PARTITIONS))
    def is_forgotten(self, partition: str) -> None:
        forget(self._path, [partition, "never there"])
        self._model.forget(partition)

    def _run(
        self, partition: str, places: list[int], *, at_once: int = 3, crash: bool = False
    ) -> list[str | None]:
        found = work(self._path, partition, places, self.near, at_once=at_once, crash=crash)
        assert found == self._model.work(partition, places, crash=crash)
        return found

    def teardown(self) -> None:
        forget(self._path, PARTITIONS)
        assert rows_left(self._path) == 0
        self._folder.cleanup()


class NearMachine(ExactMachine):
    near = THRESHOLD


def rows_left(path: Path) -> int:
    """In all tables but the list of partitions."""
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as index:
        tables = index.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'partitions'"
        ).fetchall()
        assert len(tables) == 3
        return sum(
            index.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for (name,) in tables
        )


TestExactHistories = ExactMachine.TestCase
TestExactHistories.settings = settings(max_examples=25, stateful_step_count=15)


def test_any_history_of_near_duplicates_keeps_each_text_once() -> None:
    pytest.importorskip("rensa")
    case = NearMachine.TestCase()
    case.settings = settings(max_examples=25, stateful_step_count=15)
    case.runTest()


class TestWhoKeepsAText:
    def test_the_first_row_of_the_first_partition(self, path: Path) -> None:
        assert work(path, "b", [1, 2, 1]) == [None, None, EXACT]
        assert work(path, "a", [3, 2, 3]) == [None, EXACT, EXACT]

    def test_a_run_again_changes_nothing(self, path: Path) -> None:
        first = [work(path, "a", [1, 2, 1]), work(path, "b", [2, 3])]
        assert [work(path, "a", [1, 2, 1]), work(path, "b", [2, 3])] == first
        assert [work(path, "b", [2, 3]), work(path, "a", [1, 2, 1])] == first[::-1]

    def test_what_a_partition_has_no_more_is_free(self, path: Path) -> None:
        work(path, "a", [1, 2])
        work(path, "a", [2])
        assert work(path, "b", [1, 2]) == [None, EXACT]

    def test_what_a_gone_partition_had_is_free(self, path: Path) -> None:
        forget(path, ["a"])
        assert not path.exists()
        work(path, "a", [1])
        forget(path, ["a"])
        assert work(path, "b", [1]) == [None]

    def test_after_a_crash_the_partition_takes_over(self, path: Path) -> None:
        work(path, "a", [1, 2], crash=True)
        assert work(path, "b", [1]) == [EXACT]
        assert work(path, "a", [2, 1, 1]) == [None, None, EXACT]

    def test_an_older_run_of_the_same_partition_takes_nothing_back(self, path: Path) -> None:
        older, later = (Duplicates(path, "a", None) for _ in range(2))
        with older, later:
            assert older.rules([(digest(1), None)]) == [None]
            assert later.rules([(digest(1), None), (digest(2), None)]) == [None, None]
            assert older.rules([(digest(2), None), (digest(3), None)]) == [None, None]
            older.finish()
            later.finish()
        assert work(path, "b", [1, 2, 3]) == [EXACT, EXACT, None]

    def test_many_texts_are_freed_when_their_partition_has_none(self, path: Path) -> None:
        places = list(range(2500))
        work(path, "a", places, at_once=1000)
        work(path, "a", [])
        assert work(path, "b", places, at_once=1000) == [None] * 2500

    @given(inputs=INPUTS, orders=st.lists(st.permutations(PARTITIONS), min_size=2, max_size=3))
    @settings(max_examples=25)
    def test_once_and_always_the_same(self, inputs: Inputs, orders: list[list[str]]) -> None:
        with new_index() as path:
            results = [{name: work(path, name, inputs[name]) for name in order} for order in orders]
        assert all(result == results[0] for result in results)
        stayed = Counter(p for name in PARTITIONS for p in kept(inputs[name], results[0][name]))
        assert stayed == Counter(set().union(*inputs.values()))

    @given(before=st.lists(INPUTS, min_size=1, max_size=3), inputs=INPUTS)
    @settings(max_examples=25)
    def test_once_after_any_history(self, before: list[Inputs], inputs: Inputs) -> None:
        with new_index() as path:
            for old in [*before, inputs]:
                for name in PARTITIONS:
                    work(path, name, old[name])
            stayed = Counter(
                p for n in PARTITIONS for p in kept(inputs[n], work(path, n, inputs[n]))
            )
        assert stayed == Counter(set().union(*inputs.values()))


class TestNearDuplicates:
    @pytest.fixture(autouse=True)
    def _rensa(self) -> None:
        pytest.importorskip("rensa")

    def test_a_text_that_is_left_out_leaves_out_none(self, path: Path) -> None:
        assert work(path, "a", [1, 2, 3, 2], THRESHOLD) == [None, NEAR, None, NEAR]
        assert work(path, "b", [0, 4, 5], THRESHOLD) == [NEAR, NEAR, None]

    def test_a_changed_input_is_judged_by_its_rows_alone(self, path: Path) -> None:
        assert work(path, "a", [2], THRESHOLD) == [None]
        assert work(path, "a", [1, 2, 3], THRESHOLD) == [None, NEAR, None]
        assert work(path, "a", [2, 3], THRESHOLD) == [None, NEAR]

    @given(inputs=INPUTS, orders=st.lists(st.permutations(PARTITIONS), min_size=2, max_size=3))
    @settings(max_examples=25)
    def test_one_of_each_kind_stays(self, inputs: Inputs, orders: list[list[str]]) -> None:
        with new_index() as path:
            results = [
                {name: work(path, name, inputs[name], THRESHOLD) for name in order}
                for order in orders
            ]
        assert all(result == results[0] for result in results)
        stayed = sorted(p for name in PARTITIONS for p in kept(inputs[name], results[0][name]))
        assert all(after - before > 1 for before, after in pairwise(stayed))
        for place in set().union(*inputs.values()):
            assert any(abs(place - other) <= 1 for other in stayed)

    def test_of_a_band_that_very_many_share_the_first_are_compared(self, path: Path) -> None:
        """Each band has one of two values, so that half of all texts share it."""
        chance = random.Random(5)
        inputs = {
            name: [
                b"".join(chance.choice([b"\0", b"\1"]) * 36 for _ in range(14)) for _ in range(150)
            ]
            for name in PARTITIONS
        }

        def run(name: str) -> list[str | None]:
            with Duplicates(path, name, THRESHOLD) as index:
                rules = index.rules([(digest(one), one + bytes(8)) for one in inputs[name]])
                index.finish()
            return rules

        first = {name: run(name) for name in PARTITIONS}
        assert Counter(first["c"])[NEAR] > 10
        assert {name: run(name) for name in reversed(PARTITIONS)} == first

    def test_another_threshold_is_compared_once_run_again(self, path: Path) -> None:
        assert work(path, "a", [1], 0.95) == [None]
        assert work(path, "b", [2], 0.95) == [None]
        for _ in range(2):
            assert work(path, "a", [1], THRESHOLD) == [None]
            assert work(path, "b", [2], THRESHOLD) == [NEAR]
        assert work(path, "b", [2]) == [None], "not looked for any more"
        forget(path, PARTITIONS)
        assert rows_left(path) == 0

    def test_another_algorithm_is_not_compared(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work(path, "a", [1], THRESHOLD)
        monkeypatch.setattr(duplicates, "algorithm", lambda: "of a later release")
        assert work(path, "b", [2], THRESHOLD) == [None]
        assert work(path, "a", [1], THRESHOLD) == [NEAR]

    def test_a_text_without_words_is_only_told_apart_exactly(self, path: Path) -> None:
        with Duplicates(path, "a", THRESHOLD) as index:
            texts = [(digest(text), signature(text)) for text in ("!", "?", "!")]
            assert index.rules(texts) == [None, None, EXACT]


class TestProcesses:
    @pytest.mark.parametrize("near", [None, THRESHOLD])
    def test_two_at_once_keep_each_text_once(self, path: Path, near: float | None) -> None:
        if near is not None:
            pytest.importorskip("rensa")
        spawn = multiprocessing.get_context("spawn")
        start, answers = spawn.Barrier(2), spawn.SimpleQueue()
        processes = [
            spawn.Process(target=run_twice, args=(path, name, near, start, answers))
            for name in ("a", "b")
        ]
        for process in processes:
            process.start()
        results = [answers.get() for _ in processes]
        for process in processes:
            process.join()
        for first, again in results:
            assert first == again
        stayed = Counter(text for first, _ in results for text in first)
        assert stayed == Counter(range(1000))


def run_twice(
    path: Path,
    partition: str,
    near: float | None,
    start: Barrier,
    answers: SimpleQueue[list[list[int]]],
) -> None:
    order = random.Random(partition).sample(range(1000), 1000)
    bits = {text: random.Random(text).randbytes(512) for text in order}
    results: list[list[int]] = []
    for _ in range(2):
        start.wait()
        rules: list[str | None] = []
        with Duplicates(path, partition, near) as index:
            for at in range(0, 1000, 20):
                rules += index.rules([(digest(t), bits[t]) for t in order[at : at + 20]])
                time.sleep(0.002)  # as rows take to be read: SQLite's lock is not a fair one
            index.finish()
        results.append(kept(order, rules))
    answers.put(results)


class TestUnusableFiles:
    def test_that_are_another_file_are_named(self, path: Path) -> None:
        path.write_bytes(b"no database " * 1000)
        with pytest.raises(InputError, match=r"duplicates\.sqlite.*not a database.*delete it"):
            work(path, "a", [1])

    def test_that_are_another_database_are_named(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE texts (id INTEGER)")
        with pytest.raises(InputError, match="delete it"):
            work(path, "a", [1])

    def test_of_a_later_layout_are_named(self, path: Path) -> None:
        work(path, "a", [1])
        with closing(sqlite3.connect(path)) as index:
            index.execute("PRAGMA user_version = 99")
        with pytest.raises(InputError, match=r"layout is 99.*delete it"):
            forget(path, ["a"])

    def test_that_are_damaged_are_named(self, path: Path) -> None:
        work(path, "a", range(5000), at_once=5000)
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        with pytest.raises(InputError, match="delete it"):
            work(path, "a", [1])

    def test_that_are_held_are_not_to_be_deleted(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work(path, "a", [1])
        monkeypatch.setattr(duplicates, "BUSY_S", 0.05)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="locked"):
                work(path, "a", [1])
        assert work(path, "b", [1]) == [EXACT]


ENGLISH = (
    "The harbour had been closed since the storm of the previous week, and the fishermen of the "
    "village spent their mornings mending nets on the long stone wall above the beach. Nobody "
    "spoke of the two boats that had not come back. Children carried bread from the bakery, and "
    "an old man with a broken pipe told every stranger who would listen that the sea had always "
    "taken what it wanted, that it would go on taking, and that only fools built houses so near "
    "the water. In the afternoon the wind turned, the clouds moved off towards the mountains, "
    "and for the first time in days one could see the lighthouse on the far side of the bay."
)
OTHER_ENGLISH = (
    "A compiler translates a program from one language into another. Most of them work in "
    "several passes: the source is split into tokens, the tokens are parsed into a tree, the "
    "tree is checked and simplified, and finally instructions for a machine are chosen and laid "
    "out in order. Each of these steps can be tested by itself, which is why so many textbooks "
    "on the subject are arranged in just this way, chapter after chapter, from left to right."
)
CHINESE = (
    "自从上周的暴风雨之后，港口就一直关闭着。村里的渔民每天早晨都坐在海滩上方的长石墙上修补渔网，"
    "没有人提起那两条没有回来的船。孩子们从面包店里取来面包，一位拿着破烟斗的老人告诉每一个愿意听他"
    "说话的陌生人，大海总是要拿走它想要的东西，以后也会这样，只有傻瓜才会把房子盖在离水这么近的地方。"
    "下午风向变了，云朵向群山飘去，几天以来人们第一次看见了海湾对面的灯塔。"
)
OTHER_CHINESE = (
    "编译器把程序从一种语言翻译成另一种语言。大多数编译器分几个步骤工作：先把源代码切分成记号，再把记号"
    "分析成语法树，然后检查并简化这棵树，最后选择机器指令并按顺序排列。每一个步骤都可以单独测试，"
    "因此许多教科书都按照这样的顺序一章一章地讲解。"
)


def test_near_duplicates_without_the_package_say_what_to_install(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    for use in (lambda: signature("some text"), lambda: Duplicates(path, "a", 0.8)):
        with pytest.raises(ToolError, match=r"modelcall-assets\[near-dedup\]"):
            use()
    assert work(path, "a", [1]) == [None], "exact ones need nothing"


class TestSignatures:
    @pytest.fixture(autouse=True)
    def _rensa(self) -> None:
        pytest.importorskip("rensa")

    @pytest.mark.parametrize(
        ("text", "changed", "other"),
        [
            (ENGLISH, ENGLISH.replace("broken pipe", "wooden leg"), OTHER_ENGLISH),
            (ENGLISH, "“" + ENGLISH.upper().replace(", ", " – "), OTHER_ENGLISH),
            (CHINESE, CHINESE.replace("破烟斗", "旧拐杖"), OTHER_CHINESE),
            (CHINESE, CHINESE.replace("。", "！\n"), OTHER_CHINESE),
        ],
    )
    def test_a_few_changed_words_are_found(
        self, path: Path, text: str, changed: str, other: str
    ) -> None:
        with Duplicates(path, "a", THRESHOLD) as index:
            texts = [(digest(one), signature(one)) for one in (text, other, changed)]
            assert index.rules(texts) == [None, None, NEAR]

    def test_are_the_same_in_every_process_and_release(self) -> None:
        """A change of these is a change of `algorithm`."""
        made = [signature(text) or b"" for text in (ENGLISH, CHINESE)]
        assert texts.algorithm() == "1.2"
        assert [digest(one.hex()).hex()[:8] for one in made] == ["7a4546d9", "817f2823"]

    def test_texts_that_have_few_words_or_none(self) -> None:
        assert signature(" .,;。！ \n") is None
        assert signature("") is None
        assert signature("Hello, World!") == signature("hello world")
        assert signature("hello world") != signature("hello word")
        assert signature("한국어") == signature("한 국 어")
        assert signature("\ud800 one") == signature("one")

    def test_estimate_the_true_similarity(self) -> None:
        chance = random.Random(7)
        off: list[float] = []
        for _ in range(60):
            words = [str(chance.randrange(10**6)) for _ in range(200)]
            changed = [
                word if chance.random() > 0.04 else str(chance.randrange(10**6)) for word in words
            ]
            one, other = shingles(words), shingles(changed)
            off.append(estimate(words, changed) - len(one & other) / len(one | other))
        assert abs(sum(off)) / len(off) < 0.02
        assert max(map(abs, off)) < 0.2

    @pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
    def test_bands_of_similar_texts_meet(self, threshold: float) -> None:
        chance = random.Random(3)
        one = chance.randbytes(512)
        assert len(set(bands(one, threshold))) == len(bands(one, threshold))
        close = sum(meet(one, mixed(one, threshold + 0.05, chance), threshold) for _ in range(200))
        far = sum(meet(one, mixed(one, threshold - 0.4, chance), threshold) for _ in range(200))
        assert close > 180
        assert far < 40


def shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def estimate(words: list[str], others: list[str]) -> float:
    one, other = signature(" ".join(words)), signature(" ".join(others))
    assert one is not None
    assert other is not None
    return similarity(one, other)


def meet(one: bytes, other: bytes, threshold: float) -> bool:
    return not set(bands(one, threshold)).isdisjoint(bands(other, threshold))


def mixed(one: bytes, share: float, chance: random.Random) -> bytes:
    """A signature of which each word is that of `one` with this chance."""
    words = (one[at : at + 4] for at in range(0, len(one), 4))
    return b"".join(w if chance.random() < share else chance.randbytes(4) for w in words)
