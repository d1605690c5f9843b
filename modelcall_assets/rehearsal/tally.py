"""What the server saw: counters, and a small memory of every request it met."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

UNSEEN_IN_IDENTITY = ("stream", "stream_options", "user")
COUNTERS = (
    "requests", "answered", "malformed", "truncated", "filtered", "junk", "dropped", "abandoned",
    "repeated_ok", "early_retries", "retried_bad_request", "connections", "files", "batches",
    "batch_lines",
)  # fmt: skip
_CLOCK_SLACK = 0.001


class Seen(NamedTuple):
    attempts: int = 0
    ok: int = 0
    not_before: float = 0.0  # end of the last Retry-After
    bad: bool = False  # was refused with a 400


class Ending(NamedTuple):
    """How an exchange ends: a counter's name, or "error" for an error object."""

    what: str
    status: int = 0
    data: bytes = b""
    identity: bytes | None = None
    retry_after_s: float = 0.0


_NEW = Seen()


def identify(raw: bytes, body: Any) -> bytes:
    """What makes two requests the same; bodies that are no JSON object go by their bytes."""
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if key not in UNSEEN_IN_IDENTITY}
        raw = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    return blake2b(raw, digest_size=16).digest()


class Tally:
    """`requests` = all statuses + dropped + abandoned (the client left first) + in_flight."""

    def __init__(self, in_flight: int = 0) -> None:
        self.in_flight = self.max_in_flight = in_flight
        self.counts: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.statuses: dict[str, int] = {}
        self.seen: dict[bytes, Seen] = {}
        self.first_request_at: float | None = None
        self.last_answer_at: float | None = None

    def arrived(self, now: float) -> None:
        self.counts["requests"] += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        if self.first_request_at is None:
            self.first_request_at = now

    def met(self, identity: bytes, now: float) -> int:
        """Returns how often this request was met before."""
        known = self.seen.get(identity, _NEW)
        self.counts["repeated_ok"] += known.ok > 0
        self.counts["early_retries"] += now < known.not_before - _CLOCK_SLACK
        self.counts["retried_bad_request"] += known.bad
        self.seen[identity] = Seen(known.attempts + 1, known.ok, 0.0, known.bad)
        return known.attempts

    def ended(self, end: Ending, now: float) -> None:
        self.in_flight -= 1
        if end.what != "error":
            self.counts[end.what] += 1
        ok = end.what in ("answered", "malformed", "truncated", "filtered")
        self.counts["answered"] += ok and end.what != "answered"
        if end.status:
            self.last_answer_at = now
            self.statuses[str(end.status)] = self.statuses.get(str(end.status), 0) + 1
        if end.identity is not None:
            known = self.seen.get(end.identity, _NEW)
            until = now + end.retry_after_s if end.retry_after_s else known.not_before
            bad = known.bad or end.status == 400
            self.seen[end.identity] = Seen(known.attempts, known.ok + ok, until, bad)

    def stats(self) -> dict[str, Any]:
        return {
            **self.counts,
            "distinct": len(self.seen),
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "statuses": dict(self.statuses),
            "first_request_at": self.first_request_at,
            "last_answer_at": self.last_answer_at,
        }

    def request_stats(self) -> dict[str, dict[str, int]]:
        return {key.hex(): {"attempts": s.attempts, "ok": s.ok} for key, s in self.seen.items()}
