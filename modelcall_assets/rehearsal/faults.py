"""Which request meets which fault: a pure function, so that every run meets the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from statistics import NormalDist
from typing import Any

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
        problems = [_problem(f.name, getattr(self, f.name), type(f.default)) for f in fields(self)]
        found = [problem for problem in problems if problem]
        for group in (PERMANENT, TRANSIENT, BATCH_ENDS, BATCH_CALLS) if not found else ():
            if (total := math.fsum(getattr(self, name) for name in group)) > 1 + 1e-9:
                names = ", ".join(_flag(name) for name in group)
                found.append(_wrong(names, "the rates exclude each other", "a sum ≤ 1", total))
        if found:
            raise SetupError(found)

    def changed(self, changes: Mapping[str, Any]) -> Faults:
        keys = [f.name for f in fields(self)]
        if unknown := sorted(set(changes) - set(keys)):
            raise SetupError([_wrong(", ".join(unknown), "unknown fault", ", ".join(keys))])
        return replace(self, **changes)

    @property
    def only_verdict(self) -> tuple[str, float] | None:
        """That of every attempt, when nothing is left to chance: no draw is needed then."""
        by_chance = self.latency_sigma or any(getattr(self, n) for n in (*PERMANENT, *TRANSIENT))
        return None if by_chance else ("answered", self.latency_ms / 1000)

    def verdict(self, identity: bytes, attempt: int) -> tuple[str, float]:
        """What becomes of this attempt, and after how many seconds."""
        permanent = self._pick(PERMANENT, self._draw(identity, "always")[0])
        chance, luck = self._draw(identity, str(attempt))
        transient = self._pick(TRANSIENT, chance)
        if permanent == "bad_request" or transient == "rate_limited":
            return (permanent if permanent == "bad_request" else transient), 0.0
        spread = math.exp(self.latency_sigma * _NORMAL.inv_cdf(luck)) if self.latency_sigma else 1
        answered = transient in ("answered", "malformed") and permanent != "answered"
        return (permanent if answered else transient), self.latency_ms * spread / 1000

    def batch_end(self, number: int) -> str:
        """The status that the server's batch of this number ends with."""
        end = self._pick(BATCH_ENDS, self._draw(b"batch", str(number))[0])
        return "completed" if end == "answered" else end

    def batch_call(self, number: int) -> str:
        """What becomes of the server's call of this number about files and batches."""
        return self._pick(BATCH_CALLS, self._draw(b"call", str(number))[0])

    def _draw(self, identity: bytes, which: str) -> tuple[float, float]:
        """Two numbers, the first in [0, 1), the second in (0, 1)."""
        digest = blake2b(identity + f"{self.seed}/{which}".encode(), digest_size=12).digest()
        first, second = int.from_bytes(digest[:6]), int.from_bytes(digest[6:])
        return first / 2**48, (second + 0.5) / 2**48

    def _pick(self, group: Mapping[str, str], chance: float) -> str:
        for name, what in group.items():
            chance -= getattr(self, name)
            if chance < 0:
                return what
        return "answered"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _wrong(field_name: str, wrong: str, expected: str, have: object = "") -> Problem:
    return Problem("modelcall rehearse", field_name, wrong, expected=expected, have=str(have))


def _problem(name: str, value: object, kind: type) -> Problem | None:
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        return _wrong(
            _flag(name), "wrong type", "a whole number" if kind is int else "a number", value
        )
    if name.startswith("rate_") and not 0 <= value <= 1:
        return _wrong(_flag(name), "not a share", "a number from 0 to 1", value)
    if name != "seed" and not 0 <= value < math.inf:
        return _wrong(_flag(name), "out of range", "0 or more", value)
    return None


NO_FAULTS = Faults()
