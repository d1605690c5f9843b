"""Answers that lie at an output's place and are not ours, taken over into the journal.

From then on such an answer is a reply like any other: it is found by what was asked, is parsed
anew whenever the file is made, and is not asked for again while the request stays the same. An old
row is a record's when both ask the model the same and have the same id. An id that the old system
made up, at random or from the question, is none: there the question alone decides.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import orjson

from modelcall_assets.journal.journal import Journal
from modelcall_assets.journal.lines import Address, Addresses, Entry
from modelcall_assets.llm.dialogue import replayed
from modelcall_assets.records.outcome import BadLine, Failure, Row, Success
from modelcall_assets.stages.score_table import ADOPTED
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import own_id, read_rows
from modelcall_assets.transforms.values import encode

if TYPE_CHECKING:
    from modelcall_assets.stages.asking import AskingStage

_MADE_UP = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-.{12}")


@dataclass(frozen=True, slots=True)
class OldAnswer:
    """What the model said for an old row: it counts if `text` is parsed as `values`. `kept` is
    published as it is."""

    text: str
    kept: Row
    values: Row = field(default_factory=dict)
    reasoning: str | None = None


@dataclass
class Adoption:
    """What became of old rows: `rows` stand for records of ours, `failed` hold no good answer,
    `unmatched` fit no record. `torn` names lines that are no rows."""

    files: list[str] = field(default_factory=list[str])
    rows: int = 0
    good: int = 0
    failed: int = 0
    torn: list[str] = field(default_factory=list[str])

    @property
    def unmatched(self) -> int:
        return self.good - self.rows


def look(
    stage: AskingStage, files: Sequence[Place], adoption: Adoption
) -> Iterator[tuple[Row, bytes]]:
    """The good rows of old files, each with the reply that it stands for, counted. InputError when
    a file cannot be read."""
    for file in files:
        adoption.files.append(str(file))
        for item in read_rows(file):
            if isinstance(item, BadLine):
                adoption.torn.append(f"{file.name}: {item.detail}")
            elif (reply := _reply(stage, item)) is None:
                adoption.failed += 1
            else:
                adoption.good += 1
                yield item, reply


def adopt(stage: AskingStage, source: Source, journal: Journal, files: Sequence[Place]) -> Adoption:
    """Write the good rows of old files to the journal, as replies to the records that they belong
    to. A record that has a reply keeps that."""
    adoption = Adoption()
    with _Answers() as answers:
        for row, reply in look(stage, files, adoption):
            asked = stage.ask(row)
            if not isinstance(asked, Failure):
                answers.add(asked.key(), own_id(row), reply)
        for by_id in (True, False):
            addresses = Addresses(stage.samples)
            for item, asked in chain.from_iterable(stage.asks_of(source)):
                if isinstance(item, BadLine) or isinstance(asked, Failure):
                    continue
                address = addresses.next(asked.key())
                if address in journal:
                    continue
                found = answers.take(address.key, own_id(item), by_id=by_id)
                if found is not None:
                    journal.append(_entry(address, found), findable=True)
                    adoption.rows += 1
    journal.sync()
    return adoption


def kept_of(body: bytes) -> Row:
    """What is published of an adopted reply as it was."""
    return orjson.loads(body)[ADOPTED]


def _reply(stage: AskingStage, row: Row) -> bytes | None:
    """As a server might have sent it; None when the row has no answer that is good now."""
    old = stage.old_answer(row)
    if old is None:
        return None
    message = {"role": "assistant", "content": old.text, "reasoning_content": old.reasoning}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = encode({"object": ADOPTED, "choices": [choice], ADOPTED: old.kept}).rstrip()
    turn = replayed(200, body)
    finished = turn and stage.rules.judge([turn])
    if finished is None or not isinstance(finished.outcome, Success):
        return None
    found = finished.outcome.values
    return body if all(_same(old.values[key], value) for key, value in found.items()) else None


def _same(column: Any, value: Any) -> bool:
    """A column may hold JSON text."""
    return column == value or column == orjson.dumps(value).decode()


def _entry(address: Address, body: bytes) -> Entry:
    return Entry(address, 0, 200, body, ADOPTED, attempts=0, latency_ms=0, answered_at="")


class _Answers:
    """Old answers by what was asked, on disk while they are looked up."""

    def __enter__(self) -> Self:
        self._open = ExitStack()
        folder = self._open.enter_context(TemporaryDirectory(prefix="modelcall-"))
        self._table = sqlite3.connect(Path(folder) / "answers", isolation_level=None)
        self._open.callback(self._table.close)
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute("CREATE TABLE answers (key TEXT, id TEXT, made_up INT, reply BLOB)")
        self._table.execute("CREATE INDEX by_key ON answers (key, id)")
        self._table.execute("BEGIN")
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def add(self, key: str, identity: str | None, reply: bytes) -> None:
        made_up = identity is None or _MADE_UP.fullmatch(identity) is not None
        row = (key, identity or "", made_up, reply)
        self._table.execute("INSERT INTO answers VALUES (?, ?, ?, ?)", row)

    def take(self, key: str, identity: str | None, *, by_id: bool) -> bytes | None:
        """An answer to this question that nobody has taken: of a row with this id, or of one whose
        id is made up."""
        which = "id = ?" if by_id else "made_up"
        found = self._table.execute(
            f"SELECT rowid, reply FROM answers WHERE key = ? AND {which} ORDER BY rowid LIMIT 1",
            (key, identity or "") if by_id else (key,),
        ).fetchone()
        if found is None:
            return None
        self._table.execute("DELETE FROM answers WHERE rowid = ?", found[:1])
        return found[1]
