"""The journal: every reply that arrived is there after any kill, in order, once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.journal import POSITION_BITS, Journal
from modelcall_assets.journal.lines import (
    Address,
    Addresses,
    BatchNote,
    Entry,
    Reference,
    Words,
    content_end,
    with_sum,
)
from modelcall_assets.journal.mirror import remove
from modelcall_assets.journal.packed import CACHED_BYTES
from modelcall_assets.journal.segments import FEW_SEGMENTS, SMALL_BYTES, pack, segment_paths

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
    """But for the lock, which is empty."""
    found = sorted(folder.iterdir()) if folder.exists() else []
    return [path for path in found if path.name != ".lock"]


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
    refused = reply('{"é":1}', Address(KEY, 2, 3), status=400)
    entry = refused._replace(attempts=4, latency_ms=0, endpoint="ü")
    with Journal(folder, "a") as journal:
        position = journal.append(entry)
        assert journal.chain(position)[-1] == entry
    with Journal(folder, "b") as journal:
        (dialogue,) = journal.dialogues(entry.address)
        assert dialogue.entries == (entry,)
        assert journal.chain(dialogue.positions[0])[-1] == entry
        assert len(journal) == 1


def test_addresses_do_not_mix(folder: Path) -> None:
    """The last two share the part of the key that the index looks at."""
    addresses = [Address(KEY), Address(KEY, 1), Address(KEY, 0, 1), Address("0" * 31 + "1")]
    with Journal(folder, "a") as journal:
        for number, address in enumerate(addresses):
            journal.append(reply(str(number), address))
    with Journal(folder, "b") as journal:
        assert [bodies(journal, address) for address in addresses] == [
            [["0"]], [["1"]], [["2"]], [["3"]]
        ]  # fmt: skip
        assert [address in journal for address in addresses] == [True] * 4
        for unknown in (Address("f" * 32), Address("0" * 31 + "2"), Address(KEY, 2)):
            assert journal.dialogues(unknown) == []
            assert unknown not in journal
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
    "like a line": b'{"k":"x","sealed":1,"fresh":true,"text":"t","r":{"p":["",1],"st":2}}',
    "latin-1": b"caf\xe9 \xff\n ok",
    "latin-1 in JSON": b'{"a":"caf\xe9"}',
    "spaces": b' {"a": 1}\t',
    **{f"{depth} deep": b"[" * depth + b"]" * depth for depth in (254, 255, 1023, 1024, 1025)},
    "50 KB": json.dumps({"a": "é" * 25_000}, ensure_ascii=False).encode(),
    "5 MB": json.dumps({"a": "x" * 5_000_000}).encode(),
    "5 MB of text": b"line\n" * 1_000_000,
}  # fmt: skip


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("name", BODIES)
def test_any_body_comes_back_byte_for_byte(name: str, status: int, folder: Path) -> None:
    body, next_one = BODIES[name], b'{"next":1}'
    with Journal(folder, "a") as journal:
        position = journal.append(reply(body, status=status))
        journal.append(reply(next_one))
        assert journal.chain(position)[-1].body == body
    for _ in range(2):
        with Journal(folder, "b") as journal:
            found = [dialogue.entries[0].body for dialogue in journal.dialogues(Address(KEY))]
            assert found == [body, next_one]
        pack(folder)


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
    assert sum(segment.read_text().count("sealed") for segment in files(folder)) == 2


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
        texts = [journal.chain(position)[-1].body.decode() for journal, position in written]
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
        with pytest.raises(StoreError, match=f"the line at {before[1]} was damaged while"):
            journal.chain(position)
    for _ in range(2):
        with Journal(folder, "c") as journal:
            assert bodies(journal) == []
        pack(folder)


def test_a_line_that_a_power_loss_zeroed_is_passed_over(folder: Path) -> None:
    """So is the turn that mended it; neither is taken for what came after it."""
    write(folder, "a", "0", "1")
    with Journal(folder, "b") as journal:
        known = journal.dialogues(Address(KEY))[0]
        before = journal.reference(known.positions[-1])
        journal.append(reply('"mended"', turn=1, previous=before))
    with files(folder)[0].open("r+b") as segment:
        segment.seek(before[1] + 50)
        segment.write(bytes(20))
    for _ in range(2):
        with Journal(folder, "c") as journal:
            assert bodies(journal) == [['"1"']]
        pack(folder)


def test_lines_of_format_1_are_read(folder: Path) -> None:
    folder.mkdir()
    (folder / "000001-old.jsonl").write_bytes(
        b'{"format":1,"run":"old","fresh":false}\n'
        b'{"k":"%s","st":200,"e":"h","n":1,"ms":2,"at":"t","r":{"a": 1}}\n'
        b'{"k":"%s","o":7,"t":1,"p":["000001-old.jsonl",39],"st":400,"e":"h","n":1,"ms":2,"at":"t",'
        b'"text":"no\\n"}\n{"sealed":"v"}\n' % (KEY.encode(), KEY.encode())
    )
    with Journal(folder, "new") as journal:
        assert bodies(journal) == [['{"a": 1}']]
        assert rounds(journal) == [False]
        assert Address(KEY, 7) in journal


@pytest.mark.parametrize("packed", [False, True])
def test_a_newer_format_is_refused(packed: bool, folder: Path) -> None:
    write(folder, "a", "1")
    if packed:
        pack(folder)
    path = files(folder)[0]
    old = re.search(rb'\{"format":3,.*\n', path.read_bytes())
    assert old is not None
    content = old[0][: content_end(old[0])]
    newer = with_sum(content.replace(b'"format":3', b'"format":4'))
    path.write_bytes(path.read_bytes().replace(old[0], newer))
    with pytest.raises(InputError, match="written by a newer version of modelcall"):
        Journal(folder, "b")


# Packing


def test_a_publish_packs_what_has_become_large(folder: Path) -> None:
    """Megabytes of reasoning take little space, and later runs go on from there."""
    thoughts = [f"{n}: " + "So, let me see. " * 60_000 for n in range(4)]
    write(folder, "a", *thoughts, seal="v1")
    (packed,) = files(folder)
    assert packed.name == "000001-a.jsonl.zst"
    assert packed.stat().st_size < 100_000
    with Journal(folder, "b") as journal:
        assert bodies(journal) == [[f'"{thought}"'] for thought in thoughts]
        assert rounds(journal) == [False] * 4
        assert not journal.has_unpublished
        known = journal.dialogues(Address(KEY))[2]
        before = journal.reference(known.positions[-1])
        position = journal.append(reply('"mended"', turn=1, previous=before))
        assert [entry.turn for entry in journal.chain(position)] == [0, 1]
    write(folder, "c", *thoughts, seal="v2")
    assert [path.name for path in files(folder)] == ["000003-c.jsonl.zst"]
    with Journal(folder, "d") as journal:
        said = bodies(journal)
        assert len(said) == 8
        assert [f'"{thoughts[2]}"', '"mended"'] in said


def test_many_small_segments_become_one(folder: Path) -> None:
    for run in range(3 * FEW_SEGMENTS):
        write(folder, f"run-{run}", str(run), seal=f"v{run}")
        assert len(files(folder)) <= FEW_SEGMENTS
    with Journal(folder, "z") as journal:
        assert bodies(journal) == [[f'"{run}"'] for run in range(3 * FEW_SEGMENTS)]


def test_a_packed_segment_is_plain_lines_to_other_tools(folder: Path) -> None:
    write(folder, "a", "1", "2", seal="v1")
    lines = files(folder)[0].read_bytes().splitlines(keepends=True)
    pack(folder)
    (path,) = segment_paths(folder)
    with pa.input_stream(path, compression="zstd") as stream:
        assert stream.read() == b"".join(lines[1:])


def test_reading_a_packed_segment_in_any_order_is_the_same(folder: Path) -> None:
    """More than the cache holds."""
    texts = [f"{n} " * 40_000 for n in range(150)]
    assert sum(map(len, texts)) > 2 * CACHED_BYTES
    write(folder, "a", *texts, seal="v1")
    with Journal(folder, "b") as journal:
        positions = [dialogue.positions[0] for dialogue in journal.dialogues(Address(KEY))]
        for n in [0, 149, 1, 148, *range(150), 3]:
            assert journal.chain(positions[n])[-1].body.decode() == f'"{texts[n]}"'


def test_what_a_fresh_start_hides_is_not_packed(folder: Path) -> None:
    write(folder, "a", "x" * SMALL_BYTES, seal="v1")
    write(folder, "b", "y" * SMALL_BYTES, seal="v2", fresh=True)
    (path,) = segment_paths(folder)
    with pa.input_stream(path, compression="zstd") as stream:
        assert b"xxx" not in stream.read()
    with Journal(folder, "c") as journal:
        assert [len(dialogue[0]) for dialogue in bodies(journal)] == [SMALL_BYTES + 2]


def test_a_crash_before_the_packed_ones_are_deleted_counts_nothing_twice(folder: Path) -> None:
    for run in range(3):
        write(folder, f"run-{run}", str(run))
    before = {path: path.read_bytes() for path in files(folder)}
    pack(folder)
    for path, data in before.items():
        path.write_bytes(data)
    assert len(files(folder)) == 4
    with Journal(folder, "z") as journal:
        assert bodies(journal) == [['"0"'], ['"1"'], ['"2"']]
        journal.append(reply('"3"'))
        journal.seal("v")
    assert len(files(folder)) == 1, "the next seal sweeps them"
    with Journal(folder, "z") as journal:
        assert bodies(journal) == [['"0"'], ['"1"'], ['"2"'], ['"3"']]


def test_a_crash_while_packing_leaves_everything(folder: Path) -> None:
    """The folder takes no new file, as a full disk would not."""
    write(folder, "a", "1" * SMALL_BYTES)
    with Journal(folder, "b") as journal:
        journal.append(reply('"2"'))
        (folder / "000002-b.jsonl.zst").mkdir()
        journal.seal("v")
    (folder / "000002-b.jsonl.zst").rmdir()
    assert [path.name for path in files(folder)] == ["000001-a.jsonl", "000002-b.jsonl"]
    with Journal(folder, "c") as journal:
        assert bodies(journal) == [[f'"{"1" * SMALL_BYTES}"'], ['"2"']]
        assert rounds(journal) == [False, False]


LIVING = """
import sys
from pathlib import Path
from modelcall_assets.journal import Address, Entry, Journal

with Journal(Path(sys.argv[1]), "other") as journal:
    known = journal.dialogues(Address("0" * 32))
    for line in sys.stdin:
        before = journal.reference(known[0].positions[-1])
        entry = Entry(Address("0" * 32), 1, 200, line.strip().encode(), "h", 1, 1, "t", before)
        journal.append(entry)
        print("done", flush=True)
"""


def test_a_run_of_another_process_is_not_packed_away(folder: Path) -> None:
    """It reads what is there when it starts, and writes its own segment, as long as it lives."""
    write(folder, "a", "0")
    other = subprocess.Popen(
        [sys.executable, "-c", LIVING, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None and other.stdout is not None
    with other:
        for text in ('"first"', '"second"'):
            print(text, file=other.stdin, flush=True)
            assert other.stdout.readline() == "done\n"
            write(folder, f"own-{len(text)}", "x" * SMALL_BYTES, seal="v")
            assert not remove(folder, folder)
        other.stdin.close()
    assert [path.suffix for path in files(folder)] == [".jsonl"] * 4
    write(folder, "last", "z", seal="v")
    assert [path.suffix for path in files(folder)] == [".zst"]
    with Journal(folder, "z") as journal:
        said = bodies(journal)
    assert ['"0"', '"first"'] in said and ['"0"', '"second"'] in said
    assert len(said) == 5
    assert remove(folder, folder) and not folder.exists()


def test_a_folder_that_cannot_be_written_is_read(folder: Path) -> None:
    write(folder, "a", "0")
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    with Journal(folder, "b") as journal:
        assert bodies(journal) == [['"0"']]
    assert not remove(folder, folder)


# Memory


def bytes_per_row(work: Callable[[range], object], rows: int) -> float:
    """What stays of the second half of the rows, and what was there beside it at the worst."""
    work(range(rows // 10))
    tracemalloc.start()
    try:
        kept = work(range(rows // 10, rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del kept
    return peak / (rows - rows // 10)


@pytest.mark.slow
def test_counting_and_finding_a_row_cost_22_bytes_at_any_moment() -> None:
    """From 10,000 to 100,000 rows, growth included; each is half of it."""
    keys = [hashlib.sha256(b"%d" % row).hexdigest()[:32] for row in range(100_000)]
    hashes = [Address(key).hash() for key in keys]
    counted, index = Addresses(1), Words(POSITION_BITS)

    def count(rows: range) -> None:
        for row in rows:
            counted.next(keys[row])

    def add(rows: range) -> None:
        for row in rows:
            index.add(hashes[row], row * 500)

    assert bytes_per_row(count, len(keys)) <= 11
    assert bytes_per_row(add, len(keys)) <= 11
    assert all(index.find(hashes[row]) == [row * 500] for row in range(0, len(keys), 997))


@given(st.lists(st.integers(0, 40), max_size=1500))
@settings(max_examples=20)
def test_occurrences_are_counted_in_order(numbers: list[int]) -> None:
    """Low numbers come so often that their count does not fit its byte."""
    keys = [f"{number * number // 40:016x}{0:016x}" for number in numbers * 2]
    counted, seen = Addresses(1), Counter[str]()
    for key in keys:
        assert counted.next(key).occurrence == seen[key]
        seen[key] += 1


def test_a_key_can_come_very_often() -> None:
    counted = Addresses(1)
    assert [counted.next(KEY).occurrence for _ in range(1000)] == list(range(1000))
    other = counted.next("0" * 31 + "1")
    assert other.occurrence == 1000, "only the first 16 digits are looked at"
    assert counted.next("0" * 15 + "1" * 17).occurrence == 0


def test_a_disk_that_takes_nothing_is_an_error(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with Journal(folder, "a") as journal, pytest.raises(StoreError, match="cannot be written"):
        journal.append(reply())


# Random histories

WHAT = ["ask"] * 4 + ["mend"] * 3 + ["kill", "reopen", "seal", "fresh", "pack", "crash"]
steps = st.lists(
    st.tuples(
        st.sampled_from(WHAT),
        st.integers(0, 3),
        st.floats(0, 1),
        st.sampled_from(["", "é\n", "x" * 9000]),
    ),
    max_size=30,
)


@dataclass
class Segment:
    """What a file holds: (end, record, body) of each reply; a seal has neither record nor body."""

    path: Path
    fresh: bool
    header: int
    lines: list[tuple[int, int | None, str]] = field(default_factory=list)


@dataclass
class History:
    """What the journal must hold."""

    segments: list[Segment] = field(default_factory=list)
    mends: dict[str, str] = field(default_factory=dict)
    """Body of a repair turn -> body of the turn before."""

    def visible(self) -> list[tuple[int, int | None, str]]:
        lines: list[tuple[int, int | None, str]] = []
        for segment in self.segments:
            lines = [*([] if segment.fresh else lines), *segment.lines]
        return lines

    def note(self, path: Path, fresh: bool, record: int | None, body: str) -> None:
        """The last line of the file."""
        if not self.segments or self.segments[-1].path != path:
            with path.open("rb") as file:
                self.segments.append(Segment(path, fresh, len(file.readline())))
        self.segments[-1].lines.append((path.stat().st_size, record, body))

    def cut(self, path: Path, size: int) -> None:
        segment = next(each for each in self.segments if each.path == path)
        segment.fresh &= size >= segment.header
        segment.lines = [line for line in segment.lines if line[0] <= size]

    def pack(self, path: Path) -> None:
        self.segments = [Segment(path, False, 0, self.visible())]

    def unpublished(self) -> bool:
        lines = self.visible()
        return bool(lines) and lines[-1][1] is not None

    def dialogues(self, record: int) -> list[tuple[bool, list[str]]]:
        """Each as whether its round is open and the bodies of its turns, the one that ended first
        in front."""
        found: list[tuple[bool, list[str]]] = []
        lines = self.visible()
        last_seal = max((at for at, line in enumerate(lines) if line[1] is None), default=-1)
        for at, (_, owner, body) in enumerate(lines):
            if owner == record and body in self.mends:
                before = next((d for d in found if d[1][-1] == self.mends[body]), None)
                if before is not None:
                    found.remove(before)
                    found.append((at > last_seal, [*before[1], body]))
            elif owner == record:
                found.append((at > last_seal, [body]))
        return found


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "journal"


@given(steps)
@settings(max_examples=250)
def test_any_history_keeps_every_whole_line_in_order(steps: list[Any]) -> None:
    history = History()
    with temporary_folder() as folder:
        journal, fresh = Journal(folder, "run-0"), False
        for number, (what, record, share, filler) in enumerate(steps):
            if what in ("ask", "mend"):
                address = Address(KEY, record)
                known = journal.dialogues(address) if what == "mend" else []
                body = json.dumps({"n": f"{number}{filler}"}, ensure_ascii=False)
                previous, turn = None, 0
                if known:
                    position = known[-1].positions[-1]
                    previous, turn = journal.reference(position), len(known[-1].positions)
                    before = known[-1].entries[-1].body.decode()
                    if before in history.mends.values():
                        continue
                    history.mends[body] = before
                entry = reply(body, address, turn=turn, previous=previous)
                name, _ = journal.reference(journal.append(entry))
                history.note(folder / name, fresh, record, body)
                continue
            if what == "seal" and not fresh and history.unpublished():
                journal.seal("v")
                history.note(files(folder)[-1], False, None, "")
            journal.close()
            current = segment_paths(folder)
            plain = [path for path in current if path.suffix == ".jsonl"]
            if what == "kill" and plain:
                path = plain[-1 - (record % len(plain))]
                os.truncate(path, int(share * path.stat().st_size))
                history.cut(path, path.stat().st_size)
            if what in ("pack", "crash") and current:
                before_it = {path: path.read_bytes() for path in current}
                pack(folder)
                history.pack(segment_paths(folder)[0])
                for path, data in before_it.items() if what == "crash" else ():
                    if path not in segment_paths(folder):
                        path.write_bytes(data)
            fresh = what == "fresh"
            journal = Journal(folder, f"run-{number}", fresh=fresh)
        journal.close()
        with Journal(folder, "last") as journal:
            for record in range(4):
                dialogues = journal.dialogues(Address(KEY, record))
                assert [
                    (dialogue.open_round, [entry.body.decode() for entry in dialogue.entries])
                    for dialogue in dialogues
                ] == history.dialogues(record)
                for dialogue in dialogues:
                    assert journal.chain(dialogue.positions[-1]) == list(dialogue.entries)


# Batches


NOTE = BatchNote("token", "h:1/v1", 2, 1_800_000_000.5)


def test_a_batch_is_open_from_its_first_note_to_its_last(folder: Path) -> None:
    with Journal(folder, "a") as journal:
        assert journal.open_batches() == []
        journal.append(reply("1"))
        first = journal.note(NOTE)
        assert journal.open_batches() == [(first, NOTE)]
    with Journal(folder, "b") as journal:
        submitted = replace(NOTE, id="batch_1")
        assert journal.note(submitted) > first
        assert journal.open_batches() == [(first, submitted)]
        journal.note(replace(NOTE, token="another"))
        late = journal.append(reply("2"))
    with Journal(folder, "c") as journal:
        assert journal.open_batches()[0] == (first, submitted)
        assert late > first, "what a batch brings lies behind its first note"
        journal.note(replace(submitted, ended="expired"))
        assert [note.token for _, note in journal.open_batches()] == ["another"]
    with Journal(folder, "d") as journal:
        assert [note.token for _, note in journal.open_batches()] == ["another"]
        assert bodies(journal) == [["1"], ["2"]]


def test_a_publish_or_a_fresh_start_closes_batches(folder: Path) -> None:
    with Journal(folder, "a") as journal:
        journal.note(NOTE)
        journal.seal("nothing was answered, so nothing is sealed")
        assert len(journal.open_batches()) == 1
        assert not journal.has_unpublished
        journal.append(reply("1"))
        journal.seal("v1")
        assert journal.open_batches() == []
    with Journal(folder, "b") as journal:
        assert journal.open_batches() == []
        journal.note(NOTE)
    with Journal(folder, "c", fresh=True) as journal:
        assert journal.open_batches() == []
        journal.append(reply("2"))
    with Journal(folder, "d") as journal:
        assert journal.open_batches() == []
        assert bodies(journal) == [["2"]]


def test_notes_of_batches_do_not_disturb_replies(folder: Path) -> None:
    """Also where segments are packed, and with a note that a kill tore."""
    with Journal(folder, "a") as journal:
        journal.note(NOTE)
        first = journal.append(reply("1"))
        journal.note(replace(NOTE, id="batch_1"))
        journal.append(reply("2", turn=1, previous=journal.reference(first)))
        journal.note(replace(NOTE, id="batch_1", ended="completed"))
    with Journal(folder, "b") as journal:
        journal.note(replace(NOTE, token="torn"))
    last = files(folder)[-1]
    last.write_bytes(last.read_bytes()[:-5])
    with Journal(folder, "c") as journal:
        assert bodies(journal) == [["1", "2"]]
        assert journal.open_batches() == []
        journal.append(reply("3", Address(KEY, 1)))
        journal.seal("v1")
    pack(folder)
    with Journal(folder, "d") as journal:
        assert bodies(journal) == [["1", "2"]]
        assert bodies(journal, Address(KEY, 1)) == [["3"]]
        assert not journal.has_unpublished


def test_a_reply_of_this_run_is_found_where_that_is_asked_for(folder: Path) -> None:
    with Journal(folder, "a") as journal:
        journal.append(reply("0"))
        first = journal.append(reply("1"), findable=True)
        assert bodies(journal) == [["1"]]
        journal.append(reply("2", turn=1, previous=journal.reference(first)), findable=True)
        (dialogue,) = journal.dialogues(Address(KEY))
        assert dialogue.positions[0] == first and dialogue.open_round
        assert bodies(journal) == [["1", "2"]]
    with Journal(folder, "b") as journal:
        assert bodies(journal) == [["0"], ["1", "2"]]
