"""Which answers may stand for a request: of this file, of identical requests, of other files."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from modelcall_assets.journal.journal import Address, Dialogue, Entry, Journal, Position
from modelcall_assets.journal.shared import SharedReplies


@dataclass
class Reuse:
    """A task's policy, for one file. Only successes stand for another request.

    `published`: whether answers that were published may be used when the file is materialised
    again; an interrupted run is always gone on with. `identical_once`: equal requests of the file
    are asked once (memory: an entry per distinct request). `shared`: answers of other files and
    tasks that share theirs too.
    """

    published: bool = True
    identical_once: bool = False
    shared: SharedReplies | None = None
    _kept: dict[str, Position] = field(default_factory=dict[str, Position])
    _asking: dict[str, asyncio.Event] = field(default_factory=dict[str, asyncio.Event])

    def of_file(self, journal: Journal, address: Address) -> list[Dialogue]:
        """What the file's own journal has of this record."""
        known = journal.dialogues(address)
        return known if self.published else [one for one in known if one.open_round]

    def of_others(self, journal: Journal, key: str) -> Iterator[Sequence[Entry]]:
        """Answers to the same request that are not this record's own, to be judged anew."""
        if key in self._kept:
            yield journal.chain(self._kept[key])
        elif self.shared is not None:
            yield from self.shared.find(key)

    def keep(self, key: str, position: Position) -> None:
        """This request has its answer, a success."""
        if self.identical_once:
            self._kept[key] = position

    def asked_now(self, key: str) -> asyncio.Event | None:
        """Set when the identical request that is in hand has ended."""
        return self._asking.get(key) if self._asking else None

    @contextmanager
    def asking(self, key: str) -> Generator[None]:
        """While this request is in hand."""
        if not self.identical_once:
            yield
            return
        ended = self._asking[key] = asyncio.Event()
        try:
            yield
        finally:
            del self._asking[key]
            ended.set()
