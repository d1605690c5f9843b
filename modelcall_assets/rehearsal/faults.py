"""Which request meets which fault, and what the server saw of it.

The faults are a pure function of the request and the attempt: every run meets the same ones.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from statistics import NormalDist
from typing import Any, NamedTuple, Self

import orjson

from modelcall_assets.errors import Problem, SetupError

PERMANENT = {"rate_400": "bad_request", "rate_truncated": "truncated", "rate_filtered": "filtered"}
TRANSIENT = {
    "rate_429": "rate_limited",
    "rate_500": "server_error",
    "rate_drop": "dropped",
    "rate_hang": "hung",
    "rate_junk": "junk",
    "rate_malformed": "malformed",
}
BATCH_ENDS = {
    "rate_batch_expired": "expired",
    "rate_batch_cancelled": "cancelled",
    "rate_batch_failed": "failed",
}
BATCH_CALLS = {"rate_call_500": "server_error", "rate_call_lost": "lost"}
UNSEEN_IN_IDENTITY = ("stream", "stream_options", "user")
COUNTERS = (
    "requests", "answered", "malformed", "truncated", "filtered", "junk", "dropped", "abandoned",
    "repeated_ok", "early_retries", "retried_bad_request", "connections", "files", "batches",
    "batch_lines",
)  # fmt: skip
_CLOCK_SLACK = 0.001
_NORMAL = NormalDist()


def _option(default: float, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True)
class Faults:
    """Rates are shares of 0-1. Permanent faults follow the request, transient ones the attempt."""

    latency_ms: float = _option(0.0, "Median time to answer.")
    latency_sigma: float = _option(0.0, "Spread of the latency (sigma of a lognormal).")
    rate_429: float = _option(0.0, "Share of attempts told to slow down.")
    retry_after_s: float = _option(1.0, "The Retry-After that goes with every 429.")
    rate_500: float = _option(0.0, "Share of attempts that end in a server error.")
    rate_drop: float = _option(0.0, "Share of attempts whose connection closes unanswered.")
    rate_400: float = _option(0.0, "Share of requests refused, at every attempt.")
    rate_malformed: float = _option(0.0, "Share of attempts answered in a wrong format.")
    rate_truncated: float = _option(0.0, "Share of requests cut by length, at every attempt.")
    rate_filtered: float = _option(0.0, "Share of requests stopped by a content filter, always.")
    rate_hang: float = _option(0.0, "Share of attempts that never get an answer.")
    rate_junk: float = _option(0.0, "Share of attempts answered 200 with an HTML page.")
    max_in_flight: int = _option(0, "429 for whatever comes above this many at once; 0: no limit.")
    batch_s: float = _option(0.0, "Seconds that a batch takes.")
    rate_batch_expired: float = _option(0.0, "Share of batches that expire unfinished.")
    rate_batch_cancelled: float = _option(0.0, "Share of batches that are cancelled.")
    rate_batch_failed: float = _option(0.0, "Share of batches that fail.")
    rate_batch_done: float = _option(0.5, "Share of its lines that such a batch has answered.")
    rate_call_500: float = _option(0.0, "Share of calls about files and batches that fail.")
    rate_call_lost: float = _option(0.0, "Share of them that work, but nobody hears of it.")
    max_batch_lines: int = _option(0, "A batch fails for whatever waits above this; 0: no limit.")
    seed: int = _option(0, "Another seed hits other requests.")

    def __post_init__(self) -> None:
        found: list[Problem] = []
        for each in fields(self):
            value, is_whole = getattr(self, each.name), type(each.default) is int
            if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
                wrong = ("wrong type", "a whole number" if is_whole else "a number")
            elif each.name.startswith("rate_") and not 0 <= value <= 1:
                wrong = ("not a share", "a number from 0 to 1")
            elif each.name != "seed" and not 0 <= value < math.inf:
                wrong = ("out of range", "0 or more")
            else:
                continue
            found.append(_wrong(_flag(each.name), *wrong, value))
        for group in (PERMANENT, TRANSIENT, BATCH_ENDS, BATCH_CALLS) if not found else ():
            if (total := math.fsum(getattr(self, name) for name in group)) > 1 + 1e-9:
                names = ", ".join(map(_flag, group))
                found.append(_wrong(names, "the rates exclude each other", "a sum ≤ 1", total))
        if found:
            raise SetupError(found)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        keys = [each.name for each in fields(self)]
        if unknown := sorted({*changes} - {*keys}):
            raise SetupError([_wrong(", ".join(unknown), "unknown fault", ", ".join(keys))])
        return replace(self, **changes)

    @property
    def only_verdict(self) -> tuple[str, float] | None:
        """That of every attempt, when nothing is left to chance: no draw is needed then."""
        by_chance = self.latency_sigma or any(getattr(self, n) for n in (*PERMANENT, *TRANSIENT))
        return None if by_chance else ("answered", self.latency_ms / 1000)

    def verdict(self, identity: bytes, attempt: int) -> tuple[str, float]:
        permanent = self._pick(PERMANENT, self._draw(identity, "always")[0])
        chance, luck = self._draw(identity, str(attempt))
        transient = self._pick(TRANSIENT, chance)
        if permanent == "bad_request" or transient == "rate_limited":
            return (permanent if permanent == "bad_request" else transient), 0.0
        spread = math.exp(self.latency_sigma * _NORMAL.inv_cdf(luck)) if self.latency_sigma else 1
        answered = transient in ("answered", "malformed") and permanent != "answered"
        return (permanent if answered else transient), self.latency_ms * spread / 1000

    def batch_end(self, number: int) -> str:
        return self._pick(BATCH_ENDS, self._draw(b"batch", str(number))[0], "completed")

    def batch_call(self, number: int) -> str:
        return self._pick(BATCH_CALLS, self._draw(b"call", str(number))[0])

    def _draw(self, identity: bytes, which: str) -> tuple[float, float]:
        """Two numbers, the first in [0, 1), the second in (0, 1)."""
        digest = blake2b(identity + f"{self.seed}/{which}".encode(), digest_size=12).digest()
        first, second = int.from_bytes(digest[:6]), int.from_bytes(digest[6:])
        return first / 2**48, (second + 0.5) / 2**48

    def _pick(self, group: Mapping[str, str], chance: float, otherwise: str = "answered") -> str:
        for name, what in group.items():
            chance -= getattr(self, name)
            if chance < 0:
                return what
        return otherwise


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _wrong(field_name: str, wrong: str, expected: str, have: object = "") -> Problem:
    return Problem("modelcall rehearse", field_name, wrong, expected=expected, have=str(have))


NO_FAULTS = Faults()


@dataclass(slots=True)
class Seen:
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
        self.statuses = Counter[str]()
        self.seen = defaultdict[bytes, Seen](Seen)
        self.first_request_at: float | None = None
        self.last_answer_at: float | None = None

    def arrived(self) -> None:
        self.counts["requests"] += 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        if self.first_request_at is None:
            self.first_request_at = time.monotonic()

    def met(self, identity: bytes) -> int:
        """Returns how often this request was met before."""
        seen = self.seen[identity]
        self.counts["repeated_ok"] += seen.ok > 0
        self.counts["early_retries"] += time.monotonic() < seen.not_before - _CLOCK_SLACK
        self.counts["retried_bad_request"] += seen.bad
        seen.attempts, seen.not_before = seen.attempts + 1, 0.0
        return seen.attempts - 1

    def ended(self, end: Ending) -> None:
        now = time.monotonic()
        self.in_flight -= 1
        if end.what != "error":
            self.counts[end.what] += 1
        ok = end.what in ("answered", "malformed", "truncated", "filtered")
        self.counts["answered"] += ok and end.what != "answered"
        if end.status:
            self.last_answer_at = now
            self.statuses[str(end.status)] += 1
        if end.identity is not None:
            seen = self.seen[end.identity]
            seen.ok += ok
            seen.bad |= end.status == 400
            if end.retry_after_s:
                seen.not_before = now + end.retry_after_s

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
