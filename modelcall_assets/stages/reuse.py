"""Which answers may stand for a request: of this file, of identical requests, of other files."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, field

from modelcall_assets.journal.index import Asking, SharedReplies
from modelcall_assets.journal.journal import Address, Dialogue, Entry, Journal, Position


@dataclass
class Reuse:
    """A task's policy, for one file whose journal is in `folder`. Only successes stand for another
    request.

    `published`: whether answers that were published may be used when the file is materialised
    again; an interrupted run is always gone on with. `shared`: answers of whoever shares with this
    file. `asking`: what they ask at this time; with it identical requests are asked once (memory:
    an entry per distinct request).
    """

    published: bool = True
    shared: SharedReplies | None = None
    asking: Asking | None = None
    folder: str = ""
    _kept: dict[str, Position] = field(default_factory=dict[str, Position])
    _answered: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    _taken: set[str] = field(default_factory=set[str])

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

    def keep(self, address: Address, position: Position) -> None:
        """This request has its answer, a success."""
        if self.shared is not None:
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

    def tell(self) -> None:
        """Let others find what was answered. StoreError when the table does not take it."""
        if self.shared is None or not self._answered:
            return
        answered, self._answered = self._answered, []
        self.shared.add(self.folder, answered)
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
