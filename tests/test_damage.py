"""What is damaged on the disk: every undamaged reply is given, and the others are told."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcall_assets.errors import InputError
from modelcall_assets.journal import Journal, SharedReplies
from modelcall_assets.journal.lines import Address, Entry
from modelcall_assets.journal.segments import pack, segment_paths

HEAD_BYTES = 60
RUN = "a-run-of-ours"


def key(number: int) -> str:
    return f"{number:032x}"


def entry(number: int, *, size: int = 30, turn: int = 0, previous: Any = None) -> Entry:
    """Some as common servers answer, some that are no line of JSON, some repeated."""
    text = f"reply {number} of turn {turn} " + f"{number} " * size
    body = f"{text}\n" if number % 3 == 2 else f'{{"content":"{text}"}}'
    return Entry(
        address=Address(key(number), number % 2, 0),
        turn=turn,
        status=200,
        body=body.encode(),
        endpoint="h:1/v1",
        attempts=1,
        latency_ms=12,
        answered_at="2026-01-01T00:00:00.000+00:00",
        previous=previous,
    )


def write(folder: Path, count: int, run: str = RUN, **more: Any) -> list[Entry]:
    entries = [entry(number, **more) for number in range(count)]
    with Journal(folder, run) as journal:
        for each in entries:
            journal.append(each)
    return entries


def found(journal: Journal, entries: list[Entry]) -> list[bool]:
    """Which of them are there; anything else that is said is wrong."""
    there: list[bool] = []
    for each in entries:
        known = [dialogue.entries for dialogue in journal.dialogues(each.address)]
        assert known in ([], [(each,)]), "an answer that is not the record's"
        assert (each.address in journal) is bool(known)
        there.append(bool(known))
    return there


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "journal"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


hits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.integers(1, 8)),
    min_size=1,
    max_size=6,
)
"""Where, what it is mixed with, and how many bytes."""


def damage(data: bytes, hits: list[tuple[float, int, int]]) -> tuple[bytes, list[int]]:
    """Also which bytes were hit."""
    hurt, at = bytearray(data), list[int]()
    for share, mask, length in hits:
        first = int(share * len(hurt))
        for place in range(first, min(first + length, len(hurt))):
            if place not in at:
                hurt[place] ^= mask
                at.append(place)
    return bytes(hurt), at


@given(st.integers(1, 12), hits)
@settings(max_examples=150)
def test_whatever_bytes_are_hit_every_other_line_counts_and_those_are_told(
    count: int, hits: list[tuple[float, int, int]]
) -> None:
    with temporary_folder() as folder:
        entries = write(folder, count)
        (path,) = segment_paths(folder)
        before, place = lines_of(path), 0
        hurt, at = damage(path.read_bytes(), hits)
        path.write_bytes(hurt)
        is_hit: list[bool] = []
        for line in before:
            is_hit.append(any(place <= each < place + len(line) for each in at))
            place += len(line)
        with Journal(folder, "next") as journal:
            assert found(journal, entries) == [not hit for hit in is_hit[1:]]
            told = journal.damaged.get(path.name, 0)
            assert bool(told) == any(is_hit)
            ends_meet = {place for place in at if hurt[place] == 10 or place + 1 in ends(before)}
            assert told == sum(is_hit) or ends_meet, "but where lines were cut or joined"


def ends(lines: list[bytes]) -> set[int]:
    """Places just behind each line."""
    places, place = set[int](), 0
    for line in lines:
        place += len(line)
        places.add(place)
    return places


@given(hits)
@settings(max_examples=25)
def test_a_packed_journal_gives_what_is_not_in_a_damaged_place(
    hits: list[tuple[float, int, int]],
) -> None:
    """Blocks of 256 KiB that are not hit lose nothing, nor do those whose tables are."""
    with temporary_folder() as folder:
        entries = write(folder, 90, size=3000)
        pack(folder)
        (path,) = segment_paths(folder)
        hurt, _ = damage(path.read_bytes(), hits)
        path.write_bytes(hurt)
        with Journal(folder, "next") as journal:
            there = found(journal, entries)
            lost = there.count(False)
            told = sum(journal.damaged.values())
            assert told >= lost if len(hits) == 1 else bool(told) >= bool(lost)
            assert lost <= 40 * len(hits), "a block has about 30 of them"
            if not lost:
                return
            for each, is_there in zip(entries, there, strict=True):
                if not is_there:
                    journal.append(each)
            journal.seal("v")
        with Journal(folder, "after") as journal:
            assert all(found(journal, entries)), "the lost ones were asked again"
            assert not journal.damaged, "a publication leaves out what was damaged"


@pytest.mark.parametrize("packed", [False, True])
def test_keys_of_two_lines_that_were_swapped_answer_nothing(packed: bool, folder: Path) -> None:
    entries = write(folder, 6)
    (path,) = segment_paths(folder)
    lines = lines_of(path)
    first, second = lines[1], lines[4]
    lines[1], lines[4] = second[:38] + first[38:], first[:38] + second[38:]
    path.write_bytes(b"".join(lines))
    with Journal(folder, "b") as journal:
        assert found(journal, entries) == [False, True, True, False, True, True]
        assert journal.damaged == {path.name: 2}
    if packed:
        pack(folder)
        with Journal(folder, "b") as journal:
            assert found(journal, entries) == [False, True, True, False, True, True]


def test_the_next_publication_leaves_out_what_was_damaged(folder: Path) -> None:
    entries = write(folder, 4)
    (path,) = segment_paths(folder)
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"reply", b"reqly"), *lines[3:]]))
    with Journal(folder, "b") as journal:
        assert found(journal, entries) == [True, False, True, True]
        journal.append(entries[1])
        journal.seal("v")
    with Journal(folder, "c") as journal:
        assert found(journal, entries) == [True] * 4
        assert not journal.damaged


def torn(data: bytes) -> bytes:
    return data[:-40]


def zeroed_tail(data: bytes) -> bytes:
    return data[:-40] + bytes(5000)


def zeroed_middle(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join([*lines[:-2], bytes(len(lines[-2])), lines[-1]])


@pytest.mark.parametrize("cut", [torn, zeroed_tail, zeroed_middle])
def test_a_power_cut_takes_what_it_hit_and_no_more(
    cut: Callable[[bytes], bytes], folder: Path
) -> None:
    entries = write(folder, 5)
    (path,) = segment_paths(folder)
    path.write_bytes(cut(path.read_bytes()))
    with Journal(folder, "b") as journal:
        assert found(journal, entries).count(False) == 1
        assert journal.damaged == {path.name: 1}


def test_a_segment_twice_an_empty_one_and_files_of_others_do_no_harm(folder: Path) -> None:
    entries = write(folder, 5)
    (path,) = segment_paths(folder)
    (folder / "000002-a copy.jsonl").write_bytes(path.read_bytes())
    (folder / "000003-empty.jsonl").touch()
    (folder / "000004-empty.jsonl.zst").touch()
    (folder / "000005-notes.jsonl").write_text("not a journal\n")
    (folder / "000006-noise.jsonl.zst").write_bytes(os.urandom(5000))
    (folder / "000007-folder.jsonl").mkdir()
    (folder / "notes.txt").write_text("mine")
    with Journal(folder, "b") as journal:
        for each in entries:
            assert {dialogue.entries for dialogue in journal.dialogues(each.address)} == {(each,)}
        told = journal.damaged
    assert sorted(told) == [
        "000004-empty.jsonl.zst",
        "000005-notes.jsonl",
        "000006-noise.jsonl.zst",
    ]


def test_a_turn_that_lost_the_one_before_it_joins_no_other(folder: Path) -> None:
    """Packing moves what comes after a damaged line to where that was."""
    opening, other = entry(0), entry(1)
    with Journal(folder, "a") as journal:
        before = journal.reference(journal.append(opening))
        second = journal.reference(journal.append(other))
        journal.append(entry(0, turn=1, previous=before))
        mended = entry(1, turn=1, previous=second)
        journal.append(mended)
    pack(folder)
    (path,) = segment_paths(folder)
    with Journal(folder, "b") as journal:
        assert [len(known.entries) for known in journal.dialogues(opening.address)] == [2]
    pack(folder, anew=True)
    path.unlink(missing_ok=True)
    write(folder, 0)
    with Journal(folder, "c") as journal:
        assert not journal.dialogues(opening.address)


@pytest.mark.parametrize("size", [0, 3, 20, -1])
def test_a_packed_segment_that_was_cut_off_is_told(size: int, folder: Path) -> None:
    entries = write(folder, 20, size=3000)
    pack(folder)
    (path,) = segment_paths(folder)
    path.write_bytes(path.read_bytes()[:size])
    with Journal(folder, "b") as journal:
        there = found(journal, entries)
        assert journal.damaged[path.name] >= 1
        assert any(there) == (size < 0), "what can be read of a block is"


def test_a_damaged_table_of_shared_answers_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    keys = [key(number) for number in range(2000)]
    shared = SharedReplies(path, lambda folder: Journal(Path(folder), "reader"))
    shared.add(str(tmp_path / "journal"), [(each, 0) for each in keys])
    shared.close()
    data = path.read_bytes()
    path.write_bytes(data[:12_288] + b"\xa5" * (len(data) - 12_288))
    shared = SharedReplies(path, lambda folder: Journal(Path(folder), "reader"))
    with pytest.raises(InputError, match="delete it: only reuse across files is lost"):
        for each in keys:
            list(shared.find(each))
    shared.close()
