"""What is sent for one record, and the key that names it for resume, reuse and provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from modelcall_assets.records.outcome import Number

Message = dict[str, Any]

NOT_IN_KEY = frozenset({"stream", "stream_options", "user"})
"""Body fields that cannot change the answer."""


@dataclass(slots=True)
class ChatRequest:
    """A chat-completion body. `revision` tells apart models that share a name."""

    params: Mapping[str, Any]
    messages: tuple[Message, ...]
    revision: str | None = None
    payload: bytes = field(init=False, repr=False)
    """The canonical JSON body, as sent."""

    def __post_init__(self) -> None:
        self.payload = _canonical({**self.params, "messages": self.messages})

    def key(self) -> str:
        """32 hex digits of the canonical body and the revision; never of the endpoint."""
        body = self.payload
        if not NOT_IN_KEY.isdisjoint(self.params):
            params = {name: value for name, value in self.params.items() if name not in NOT_IN_KEY}
            body = _canonical({**params, "messages": self.messages})
        digest = hashlib.sha256(body)
        if self.revision is not None:
            digest.update(b"\0" + self.revision.encode())
        return digest.hexdigest()[:32]

    def followed_by(self, answer: str, correction: str) -> ChatRequest:
        """The next turn: the model's own answer, then what to mend."""
        turn: tuple[Message, ...] = (
            {"role": "assistant", "content": answer},
            {"role": "user", "content": correction},
        )
        return ChatRequest(self.params, self.messages + turn, self.revision)


def _canonical(body: Mapping[str, Any]) -> bytes:
    option = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_SUBCLASS
    return orjson.dumps(body, default=_as_written, option=option)


def _as_written(value: Any) -> orjson.Fragment:
    if isinstance(value, Number):
        return orjson.Fragment(str(value))
    raise TypeError(f"{type(value).__name__} has no JSON")
