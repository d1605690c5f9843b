"""The journal: every reply that arrived is there after any kill, in order, once."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcall_assets.journal.journal import Address, Entry, Journal, Reference

KEY = "0" * 32


def reply(
    body: bytes | str = '{"n":1}',
    address: Address | str = KEY,
    turn: int = 0,
    previous: Reference | None = None,
    **more: Any,
) -> Entry:
    return Entry(
        address=Address(address) if isinstance(address, str) else address,
        turn=turn,
        status=more.get("status", 200),
        body=body.encode() if isinstance(body, str) else body,
        endpoint="h:1/v1",
        attempts=1,
        latency_ms=12,
        answered_at="2026-01-01T00:00:00.000+00:00",
        previous=previous,
    )


def bodies(journal: Journal, address: Address | str = KEY) -> list[list[str]]:
    """Per dialogue, the replies as text."""
    where = Address(address) if isinstance(address, str) else address
    return [[entry.body.decode() for entry in d.entries] for d in journal.dialogues(where)]


def rounds(journal: Journal) -> list[bool]:
    return [dialogue.open_round for dialogue in journal.dialogues(Address(KEY))]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def write(
    folder: Path, run: str, *texts: str, seal: str | None = None, fresh: bool = False
) -> None:
    with Journal(folder, run, fresh=fresh) as journal:
        for text in texts:
            journal.append(reply(f'"{text}"'))
        if seal is not None:
            journal.seal(seal)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_a_reply_comes_back_whole(folder: Path) -> None:
    entry = replace(
        reply('{"é":1}', Address(KEY, 2, 3), status=400), attempts=4, latency_ms=0, endpoint="ü"
    )
    with Journal(folder, "a") as journal:
        position = journal.append(entry)
        assert journal.read(position) == entry
    with Journal(folder, "b") as journal:
        (dialogue,) = journal.dialogues(entry.address)
        assert dialogue.entries == (entry,)
        assert journal.read(dialogue.positions[0]) == entry
        assert len(journal) == 1


def test_addresses_do_not_mix(folder: Path) -> None:
    addresses = [Address("k"), Address("k", 1), Address("k", 0, 1), Address("l")]
    with Journal(folder, "a") as journal:
        for number, address in enumerate(addresses):
            journal.append(reply(str(number), address))
    with Journal(folder, "b") as journal:
        assert [bodies(journal, address) for address in addresses] == [
            [["0"]], [["1"]], [["2"]], [["3"]]
        ]  # fmt: skip
        assert bodies(journal, "unknown") == []
        assert len(journal) == 4


BODIES = {
    "newlines": b'{\n  "a": "x\\ny"\n}\n',
    "carriage return": b'{"a":\r1}',
    "not json": b"<html>\n<b>502</b>\r\n</html>\n",
    "half json": b'{"a": [1, 2',
    "empty": b"",
    "null": b"null",
    "quotes": b'a "quoted" \\ text',
    "separators": '{"a":"\u2028\u0085\ufeff"}'.encode(),
    "bom": b'\xef\xbb\xbf{"a":1}',
    "lone surrogate": b'{"a":"\\ud800"}',
    "nul": b'a\x00b',
    "like a line": b'{"k":"x","sealed":1,"fresh":true,"text":"t"}',
    **{f"{depth} deep": b"[" * depth + b"]" * depth for depth in (254, 255, 1023, 1024, 1025)},
    "50 KB": json.dumps({"a": "é" * 25_000}, ensure_ascii=False).encode(),
    "5 MB": json.dumps({"a": "x" * 5_000_000}).encode(),
    "5 MB of text": b"line\n" * 1_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_any_body_survives(name: str, folder: Path) -> None:
    with Journal(folder, "a") as journal:
        positions = [journal.append(reply(body)) for body in (BODIES[name], b'"next"')]
        before = journal.read(positions[0]).body
    with Journal(folder, "b") as journal:
        one, two = (dialogue.entries[0].body for dialogue in journal.dialogues(Address(KEY)))
    assert (two, one) == (b'"next"', before)
    try:
        assert json.loads(one) == json.loads(BODIES[name])
    except (ValueError, RecursionError):
        assert one == BODIES[name]


def test_bytes_that_are_no_text_survive_as_text(folder: Path) -> None:
    with Journal(folder, "a") as journal:
        position = journal.append(reply(b"caf\xe9 \xff\n ok"))
        assert journal.read(position).body.decode() == "caf\ufffd \ufffd\n ok"
    with Journal(folder, "b") as journal:
        assert bodies(journal) == [["caf\ufffd \ufffd\n ok"]]


def test_replay_is_the_union_of_all_segments_oldest_first(folder: Path) -> None:
    for run in range(12):
        write(folder, f"run-{12 - run}", str(run))
    assert len(files(folder)) == 12
    with Journal(folder, "last") as journal:
        assert bodies(journal) == [[f'"{run}"'] for run in range(12)]


def test_nothing_appended_leaves_no_file(folder: Path) -> None:
    write(folder, "a")
    write(folder, "b", seal="v", fresh=True)
    with Journal(folder, "c") as journal:
        journal.sync()
    assert files(folder) == []
    write(folder, "d", "1", seal="v")
    write(folder, "e", seal="v")
    assert len(files(folder)) == 1


def test_an_appended_reply_is_on_disk_before_close(folder: Path) -> None:
    with Journal(folder, "a") as journal:
        journal.append(reply('"x"'))
        journal.sync()
        journal.append(reply('"y"'))
        with Journal(folder, "b") as other:
            assert bodies(other) == [['"x"'], ['"y"']]


@pytest.mark.parametrize("tail", [b"{", b'{"k":"', b"\x00" * 4096, b'{"sealed":"v"}', b"\xff"])
def test_a_torn_tail_is_passed_over(tail: bytes, folder: Path) -> None:
    write(folder, "a", "1", "2")
    with files(folder)[0].open("ab") as segment:
        segment.write(tail)
    with Journal(folder, "b") as journal:
        assert bodies(journal) == [['"1"'], ['"2"']]
        assert rounds(journal) == [True, True]
        journal.append(reply('"3"'))
    with Journal(folder, "c") as journal:
        assert bodies(journal) == [['"1"'], ['"2"'], ['"3"']]


def test_a_segment_of_zero_bytes_is_passed_over(folder: Path) -> None:
    write(folder, "a", "1")
    os.truncate(files(folder)[0], 0)
    write(folder, "b", "2")
    with Journal(folder, "c") as journal:
        assert bodies(journal) == [['"2"']]


def test_fresh_hides_earlier_replies_and_deletes_nothing(folder: Path) -> None:
    write(folder, "a", "old")
    before = files(folder)[0].read_bytes()
    with Journal(folder, "b", fresh=True) as journal:
        assert bodies(journal) == []
        assert len(journal) == 0
        journal.append(reply('"new"'))
    assert files(folder)[0].read_bytes() == before
    with Journal(folder, "c") as journal:
        assert bodies(journal) == [['"new"']]


def test_a_fresh_run_that_got_nothing_hides_nothing(folder: Path) -> None:
    write(folder, "a", "old")
    write(folder, "b", fresh=True)
    with Journal(folder, "c") as journal:
        assert bodies(journal) == [['"old"']]


def test_a_dialogue_of_an_open_round_stands_until_sealed(folder: Path) -> None:
    write(folder, "a", "1")
    with Journal(folder, "b") as journal:
        assert rounds(journal) == [True]
        journal.append(reply('"2"'))
    with Journal(folder, "c") as journal:
        assert rounds(journal) == [True, True]
        journal.seal("v1")
    with Journal(folder, "d") as journal:
        assert rounds(journal) == [False, False]
        journal.append(reply('"3"'))
    with Journal(folder, "e") as journal:
        assert rounds(journal) == [False, False, True]


def test_a_seal_is_written_once_per_round(folder: Path) -> None:
    with Journal(folder, "a") as journal:
        journal.append(reply())
        journal.seal("v1")
        journal.seal("v1")
        journal.append(reply())
        journal.seal("v2")
    write(folder, "b", seal="v2")
    (segment,) = files(folder)
    assert segment.read_text().count("sealed") == 2


def test_a_torn_seal_leaves_the_round_open(folder: Path) -> None:
    write(folder, "a", "1", seal="v1")
    segment = files(folder)[0]
    os.truncate(segment, segment.stat().st_size - 1)
    with Journal(folder, "b") as journal:
        assert rounds(journal) == [True]
        journal.seal("v1")
    with Journal(folder, "c") as journal:
        assert rounds(journal) == [False]


def test_a_chain_goes_over_turns_and_segments(folder: Path) -> None:
    with Journal(folder, "a") as journal:
        first = journal.append(reply('"0"'))
        second = journal.append(reply('"1"', turn=1, previous=journal.reference(first)))
        assert [entry.body for entry in journal.chain(second)] == [b'"0"', b'"1"']
        assert [entry.body for entry in journal.chain(first)] == [b'"0"']
    for turn in (2, 3):
        with Journal(folder, f"run-{turn}") as journal:
            (dialogue,) = journal.dialogues(Address(KEY))
            before = journal.reference(dialogue.positions[-1])
            journal.append(reply(f'"{turn}"', turn=turn, previous=before))
    with Journal(folder, "z") as journal:
        (dialogue,) = journal.dialogues(Address(KEY))
        assert journal.chain(dialogue.positions[-1]) == list(dialogue.entries)
        assert [entry.body for entry in dialogue.entries] == [b'"0"', b'"1"', b'"2"', b'"3"']
        assert [entry.turn for entry in dialogue.entries] == [0, 1, 2, 3]
        segments = {journal.reference(position)[0] for position in dialogue.positions}
        assert len(segments) == 3


def test_positions_name_segment_and_offset(folder: Path) -> None:
    for run in range(5):
        write(folder, f"run-{run}", "x" * 10 * run, "y")
    with Journal(folder, "z") as journal:
        last = journal.append(reply('"z"'))
        found = [d.positions[0] for d in journal.dialogues(Address(KEY))] + [last]
        assert len(set(found)) == 11
        assert found == sorted(found)
        assert all(0 <= position < 2**63 for position in found)
        names = [path.name for path in files(folder)]
        for position in found:
            name, offset = journal.reference(position)
            line = (folder / name).read_bytes()[offset:].splitlines()[0]
            assert name in names
            assert json.loads(line)["k"] == KEY


def test_two_writers_do_not_damage_each_other(folder: Path) -> None:
    write(folder, "a", "0")
    with Journal(folder, "left") as left, Journal(folder, "right") as right:
        written = [
            (journal, journal.append(reply(f'"{name}{n}"')))
            for n in range(50)
            for journal, name in ((left, "l"), (right, "r"))
        ]
        texts = [journal.read(position).body.decode() for journal, position in written]
        assert texts == [f'"{name}{n}"' for n in range(50) for name in "lr"]
    with Journal(folder, "z") as journal:
        said = [dialogue[0] for dialogue in bodies(journal)]
    assert said[0] == '"0"'
    assert [text for text in said if "l" in text] == [f'"l{n}"' for n in range(50)]
    assert [text for text in said if "r" in text] == [f'"r{n}"' for n in range(50)]
    assert len(said) == 101


def test_two_writers_that_mend_the_same_answer_make_two_dialogues(folder: Path) -> None:
    write(folder, "a", "0")
    with Journal(folder, "left") as left, Journal(folder, "right") as right:
        for journal, text in ((left, "l"), (right, "r")):
            (known,) = journal.dialogues(Address(KEY))
            before = journal.reference(known.positions[-1])
            journal.append(reply(f'"{text}"', turn=1, previous=before))
    with Journal(folder, "z") as journal:
        assert bodies(journal) == [['"0"', '"l"'], ['"0"', '"r"']]
        for dialogue in journal.dialogues(Address(KEY)):
            assert journal.chain(dialogue.positions[-1]) == list(dialogue.entries)


def test_a_repair_turn_follows_its_own_dialogue(folder: Path) -> None:
    """`left` cannot see what `right` began meanwhile, and mends the older answer."""
    write(folder, "a", "0")
    with Journal(folder, "left") as left, Journal(folder, "b") as right:
        right.append(reply('"b"'))
        (known,) = left.dialogues(Address(KEY))
        before = left.reference(known.positions[-1])
        left.append(reply('"c"', turn=1, previous=before))
    with Journal(folder, "z") as journal:
        assert sorted(bodies(journal)) == [['"0"', '"c"'], ['"b"']]


def test_a_turn_whose_dialogue_is_lost_is_nothing(folder: Path) -> None:
    write(folder, "a", "0")
    with Journal(folder, "b") as journal:
        (known,) = journal.dialogues(Address(KEY))
        before = journal.reference(known.positions[-1])
        position = journal.append(reply('"1"', turn=1, previous=before))
        os.truncate(files(folder)[0], before[1] + 5)
    with Journal(folder, "c") as journal:
        assert bodies(journal) == []
        with pytest.raises(OSError, match="no whole line"):
            journal.chain(position)


def test_a_disk_that_takes_nothing_is_an_error(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with Journal(folder, "a") as journal, pytest.raises(OSError):
        journal.append(reply())


# Random histories

steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 3), st.sampled_from(["", "é\n", "x" * 9000])),
        st.tuples(st.just("mend"), st.integers(0, 3), st.just("")),
        st.tuples(st.just("kill"), st.floats(0, 1), st.just("")),
        st.tuples(st.just("reopen"), st.just(0), st.just("")),
        st.tuples(st.just("seal"), st.just(0), st.just("")),
    ),
    max_size=25,
)


class History:
    """What the journal must hold."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, int, str]] = []  # segment, end, record, body
        self.mends: dict[str, str] = {}  # body of a repair turn -> body of the turn before

    def dialogues(self, record: int) -> list[list[str]]:
        """Each as the bodies of its turns, the one that ended first in front."""
        found: list[list[str]] = []
        for _, _, owner, body in self.lines:
            if owner != record:
                continue
            if body in self.mends:
                before = next(d for d in found if d[-1] == self.mends[body])
                found.remove(before)
                found.append([*before, body])
            else:
                found.append([body])
        return found


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "journal"


@given(steps)
@settings(max_examples=150, deadline=None)
def test_any_history_keeps_every_whole_line_in_order(steps: list[Any]) -> None:
    history = History()
    with temporary_folder() as folder:
        journal, runs = Journal(folder, "run-0"), 0
        for number, (what, value, filler) in enumerate(steps):
            if what in ("ask", "mend"):
                address = Address("k", value)
                known = journal.dialogues(address) if what == "mend" else []
                body = json.dumps(f"{number}{filler}", ensure_ascii=False)
                previous, turn = None, 0
                if known:
                    position = known[-1].positions[-1]
                    previous, turn = journal.reference(position), len(known[-1].positions)
                    before = known[-1].entries[-1].body.decode()
                    if any(after == before for after in history.mends.values()):
                        continue
                    history.mends[body] = before
                name, _ = journal.reference(
                    journal.append(reply(body, address, turn=turn, previous=previous))
                )
                history.lines.append((name, (folder / name).stat().st_size, value, body))
            elif what == "seal":
                journal.seal("v")
            else:
                journal.__exit__(None, None, None)
                if what == "kill" and (segments := files(folder)):
                    size = int(value * segments[-1].stat().st_size)
                    os.truncate(segments[-1], size)
                    lost = [
                        line
                        for line in history.lines
                        if line[0] == segments[-1].name and line[1] > size
                    ]
                    history.lines = [line for line in history.lines if line not in lost]
                    for line in lost:
                        history.mends.pop(line[3], None)
                runs += 1
                journal = Journal(folder, f"run-{runs}")
        journal.__exit__(None, None, None)
        with Journal(folder, "last") as journal:
            for record in range(4):
                address = Address("k", record)
                assert bodies(journal, address) == history.dialogues(record)
                for dialogue in journal.dialogues(address):
                    assert journal.chain(dialogue.positions[-1]) == list(dialogue.entries)
