"""Answers from elsewhere: old results at an output's place, and the journals of whoever shares.

An old answer is written to the journal and is a reply like any other from then on: it is found by
what was asked, is parsed anew whenever the file is made, and is not asked for again while the
request stays the same. An old row is a record's when both ask the model the same and have the same
id. An id that the old system made up, at random or from the question, is none: there the question
alone decides.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import orjson

from modelcall_assets.journal import Journal, Position, SharedReplies
from modelcall_assets.journal.lines import Address, Addresses, Entry
from modelcall_assets.journal.segments import Asking
from modelcall_assets.llm.classify import Reply
from modelcall_assets.llm.dialogue import said_in
from modelcall_assets.records.outcome import BadLine, Failure, Row, Success
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.files import in_thread
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import own_id, read_rows
from modelcall_assets.transforms import encode

if TYPE_CHECKING:
    from modelcall_assets.stages.asking import AskingStage

ADOPTED = "adopted"
"""The endpoint of an answer that was taken over."""
_MADE_UP = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-.{12}")
_UNKNOWN = dict.fromkeys(
    ("api_finish_reason", "api_model", "api_prompt", "api_answered_at", "api_latency_ms")
)


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
    """What became of old rows: of the `good` ones `rows` stand for records of ours, `failed` hold
    no good answer. `torn` names lines that are no rows."""

    files: list[str] = field(default_factory=list[str])
    rows: int = 0
    good: int = 0
    failed: int = 0
    torn: list[str] = field(default_factory=list[str])


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
    with closing(_Answers()) as answers:
        for row, reply in look(stage, files, adoption):
            asked = stage.ask(row)
            if not isinstance(asked, Failure):
                answers.add(asked.key, own_id(row), reply)
        for by_id in (True, False):
            addresses = Addresses(stage.samples)
            for item, asked in chain.from_iterable(stage.asks_of(source)):
                if isinstance(item, BadLine) or isinstance(asked, Failure):
                    continue
                address = addresses.next(asked.key)
                if address in journal:
                    continue
                found = answers.take(address.key, own_id(item), by_id=by_id)
                if found is not None:
                    old = Entry(address, 0, 200, found, ADOPTED, 0, 0, answered_at="")
                    journal.append(old, findable=True)
                    adoption.rows += 1
    journal.sync()
    return adoption


def adopted_row(row: Row, body: bytes) -> Row:
    """Of a reply that was taken over: what was published of it, and no more than is known."""
    kept = orjson.loads(body)[ADOPTED]
    return {**row, **_UNKNOWN, **kept, ADOPTED: kept}


def _reply(stage: AskingStage, row: Row) -> bytes | None:
    """As a server might have sent it; None when the row has no answer that is good now."""
    old = stage.old_answer(row)
    if old is None:
        return None
    message = {"role": "assistant", "content": old.text, "reasoning_content": old.reasoning}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = encode({"object": ADOPTED, "choices": [choice], ADOPTED: old.kept}).rstrip()
    finished = stage.rules.judge(said_in([Reply(200, {}, body)]))
    if finished is None or not isinstance(finished.outcome, Success):
        return None
    for key, value in finished.outcome.values.items():
        if old.values[key] not in (value, orjson.dumps(value).decode()):  # a column of JSON text
            return None
    return body


class _Answers:
    """Old answers by what was asked, in a nameless file while they are looked up."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None)
        self.close = self._table.close
        self._table.execute("CREATE TABLE answers (key TEXT, id TEXT, made_up INT, reply BLOB)")
        self._table.execute("CREATE INDEX by_key ON answers (key, id)")
        self._table.execute("BEGIN")

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


@dataclass
class Reuse:
    """A task's policy, for one file whose journal is in `folder`. Only successes stand for another
    request.

    `published`: whether answers that were published may be used when the file is materialised
    again; an interrupted run is always gone on with. `shared`: answers of whoever shares with this
    file, all of this run if `is_of_run`. `asking`: what they ask at this time; with it identical
    requests are asked once (memory: an entry per distinct request).
    """

    published: bool = True
    shared: SharedReplies | None = None
    is_of_run: bool = False
    asking: Asking | None = None
    folder: str = ""
    _kept: dict[str, Position] = field(default_factory=dict[str, Position])
    _answered: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    _taken: set[str] = field(default_factory=set[str])

    async def find(
        self, journal: Journal, key: str, is_anew: bool = False
    ) -> Sequence[Sequence[Entry]]:
        """Answers to the same request that are not this record's own, to be judged anew; for one
        that `is_anew` those of this run."""
        if key in self._kept:
            return [journal.chain(self._kept[key])]
        if self.shared is None or (is_anew and not self.is_of_run):
            return []
        return await in_thread(self.shared.find, key)

    def keep(self, address: Address, position: Position) -> None:
        """This request has its answer, a success; where it is shared."""
        self._answered.append((address.key, address.occurrence))
        if self.asking is not None:
            self._kept[address.key] = position

    def take(self, key: str) -> Awaitable[object] | None:
        """None when this file is to ask; else what to wait for before trying again."""
        if self.asking is None:
            return None
        if (other := self.asking.take(key)) is None:
            self._taken.add(key)
        return other

    def leave(self, key: str) -> None:
        """Nobody asks this now. What was answered is told first: see `tell`."""
        if key not in self._kept:
            self._let_go(key)

    async def tell(self) -> None:
        """Let others find what was answered. StoreError when the table does not take it."""
        if self.shared is None or not self._answered:
            return
        answered, self._answered = self._answered, []
        await in_thread(self.shared.add, self.folder, answered)
        for key, _ in answered:
            self._let_go(key)

    def close(self) -> None:
        """What is in hand was not answered."""
        for key in tuple(self._taken):
            self._let_go(key)
        if self.shared is not None:
            self.shared.close()

    def _let_go(self, key: str) -> None:
        if self.asking is not None and key in self._taken:
            self._taken.discard(key)
            self.asking.release(key)
