"""Requests that wait for their batches, and what the last batch said of them."""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import orjson

from modelcall_assets.journal.lines import Address
from modelcall_assets.llm.dialogue import ChatRequest
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.stages.replay import Pending

if TYPE_CHECKING:
    from modelcall_assets.llm.batch import Ended


ROWS_AT_ONCE = 100
"""Read before others can run."""


class Spool:
    """Pending requests on disk, for as long as the process lives, and how far each has come."""

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  closed by `close`
        self.size = 0
        self.settled = bytearray()
        self.asked = array("H")
        """The turn that was in the last batch, counted from 1; 0 for none."""
        self.tries = array("H")
        """How often that turn was not answered."""
        self.told: Told | None = None
        """Of the last batch."""

    def __len__(self) -> int:
        return len(self.settled)

    def add(self, item: Pending) -> None:
        head = orjson.dumps({"i": item.index, "a": tuple(item.address)})
        line = b"".join((head[:-1], b',"body":', item.request.payload, b"}\n"))
        self.size += self._file.write(line)
        self.settled.append(False)
        self.asked.append(0)
        self.tries.append(0)

    async def unsettled(self) -> AsyncIterator[tuple[int, Pending]]:
        """Number and request; others can run meanwhile."""
        self._file.seek(0)
        for number, line in enumerate(self._file):
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
            if not self.settled[number]:
                yield number, _pending(line)

    def close(self) -> None:
        self._file.close()


@dataclass
class Told:
    """What an ended batch says beside its answers."""

    batch_id: str
    ended: Ended | None
    """None: the endpoint does not know it any more."""
    lines: int = 0
    asked: set[str] = field(default_factory=set[str])
    """Ids of its requests; empty when nobody knows them any more."""
    answered: set[str] = field(default_factory=set[str])
    strangers: Counter[str] = field(default_factory=Counter[str])
    """Ids of lines that count for nothing, by how many."""
    refusal: str | None = None
    counts: bool = True
    """Whether it was a try for the requests that it left without an answer."""
    _failures: dict[str, Failure] = field(default_factory=dict[str, Failure])
    _distinct: dict[Failure, Failure] = field(default_factory=dict[Failure, Failure])

    @property
    def has_nothing(self) -> bool:
        """Whether it failed, or is gone, without having done anything."""
        return not self.lines and (self.ended is None or self.ended.status == "failed")

    def is_strange(self, custom_id: str) -> bool:
        """Whether the batch was not asked for this, or has answered it already."""
        strange = custom_id in self.answered or bool(self.asked and custom_id not in self.asked)
        if strange:
            self.strangers[custom_id] += 1
        return strange

    def fail(self, custom_id: str, failure: Failure) -> None:
        """Thousands of requests may have one failure."""
        self._failures[custom_id] = self._distinct.setdefault(failure, failure)

    def failure_of(self, custom_id: str) -> Failure:
        """Why a request of the batch has no answer."""
        if (known := self._failures.get(custom_id)) is not None:
            return known
        status = self.ended.status if self.ended else "gone"
        detail = f"batch {self.batch_id} ({status}) has neither answer nor error for this request"
        if self.ended is not None and self.ended.error:
            full = self.ended.queue_full
            reason = Reason.RATE_LIMITED if full else Reason.SERVER_ERROR
            return Failure(reason, f"{detail}: {self.ended.error}")
        return Failure(Reason.DROPPED, detail)


def _pending(line: bytes) -> Pending:
    """What `Spool.add` wrote; its revision is in the key already."""
    data: dict[str, Any] = orjson.loads(line)
    body = data["body"]
    messages = tuple(body.pop("messages"))
    return Pending(data["i"], Address(*data["a"]), ChatRequest(body, messages))
