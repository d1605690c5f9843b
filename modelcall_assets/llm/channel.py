"""One endpoint as an engine sees it: how fast it may be asked, how much of that is its own,
and whether it answers. Nothing here waits or reads a clock: `now` is always given, in seconds."""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import NamedTuple, Self

from modelcall_assets.errors import EndpointDown, EndpointRefused
from modelcall_assets.llm.classify import Refused, TryAgain, Verdict
from modelcall_assets.llm.completion import Answer
from modelcall_assets.llm.transport import HttpTransport
from modelcall_assets.records.outcome import Failure, Reason

EJECT_AFTER = 5
"""Failures in a row, with no answer between."""
FIRST_EJECTION_S, LONGEST_EJECTION_S = 1.0, 60.0
FORBIDDEN_IN_A_ROW = 25
"""So many of FORBIDDEN_STATUS with no answer between, and twice as many as requests are in flight,
are the endpoint's refusal. A slow answer may be overtaken by many of them."""
SHORTEST_ROUND_S, LONGEST_ROUND_S = 0.1, 1.0
"""Time between two looks at an endpoint's replies; between these, as long as a request takes."""
STRAY_SHARE = 0.1
"""Of a round's replies. More that are "too busy" say that the window is too large."""
GROW_EVERY_S = 1.0
SLOWEST_GROWTH, FASTEST_GROWTH = 1 / 32, 1 / 2
"""Of the window, at a time; doubles from one time to the next."""


class Bucket:
    """Holds a second's worth and refills in 61: any minute lets out at most `per_minute`, and
    what a single taking larger than the whole bucket is over it."""

    def __init__(self, per_minute: float) -> None:
        self._per_minute = per_minute
        self._size = self._level = per_minute / 61
        self._at = float("-inf")

    def share(self, fraction: float, now: float) -> None:
        """Go on with a fraction of the whole."""
        self._fill(now)
        self._size = self._per_minute * fraction / 61
        self._level = min(self._level, self._size)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; infinity without a share."""
        self._fill(now)
        if self._size <= 0:
            return float("inf")
        lacking = min(amount, self._size) - self._level
        return lacking / self._size if lacking > 1e-9 else 0.0

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def give_back(self, amount: float) -> None:
        """What was reserved and not used; negative when more was used. That holds
        up nobody for longer than a minute."""
        lowest = min(self._level, -60 * self._size)
        self._level = min(self._size, max(lowest, self._level + amount))

    def _fill(self, now: float) -> None:
        self._level = min(self._size, self._level + (now - self._at) * self._size)
        self._at = now


class Window:
    """How many requests may be in flight, as the endpoint's own replies say.

    A "too busy" reply closes its slot for about as long as a request takes. After that time the
    window shrinks by half the share of such replies, but not below what the endpoint has accepted.
    A few stray ones leave it as it is; without any it grows about once a second.
    """

    def __init__(self, largest: int) -> None:
        self.cap = self._largest = largest
        self._size = float(largest)
        self._growth = SLOWEST_GROWTH
        self._replies = self._busy = 0
        self._is_ill = False
        self._latency_s = LONGEST_ROUND_S
        self._round_from = self._grown_at = self._calm_from = float("-inf")

    def answered(self, now: float, in_flight: int, latency_s: float) -> None:
        self._latency_s += (latency_s - self._latency_s) / 16
        if self._busy or self._size < self._largest:
            self._count(now, in_flight)

    def failed(self, now: float, in_flight: int, *, busy: bool, after_s: float) -> None:
        """No answer; `busy` when the endpoint had too much to do. No growth for `after_s`."""
        if busy and not self._busy:
            self._replies, self._round_from = 0, now
        self._busy += busy
        self.cap = max(1, self.cap - busy)
        self._is_ill = True
        self._calm_from = max(self._calm_from, now + after_s)
        self._count(now, in_flight)

    def _count(self, now: float, in_flight: int) -> None:
        self._replies += 1
        round_s = min(LONGEST_ROUND_S, max(SHORTEST_ROUND_S, self._latency_s))
        if now - self._round_from < round_s:
            return
        share = self._busy / self._replies
        if share > STRAY_SHARE:
            self._size = min(self._size, max(1.0, self._size * (1 - share / 2), in_flight))
        if self._is_ill:
            self._growth, self._grown_at = SLOWEST_GROWTH, now
        elif now >= max(self._calm_from, self._grown_at + GROW_EVERY_S):
            self._size = min(self._largest, self._size * (1 + self._growth) + 0.5)
            self._growth, self._grown_at = min(FASTEST_GROWTH, self._growth * 2), now
        self._replies = self._busy = 0
        self.cap = int(self._size)
        self._is_ill = False
        self._round_from = now


_BUSY, _IDLE = ".lease", ".idle"


class Share(NamedTuple):
    """`claim` requests may be in flight now, `target` once the others have made room."""

    claim: int
    target: int


@dataclass(eq=False)
class Lease:
    """One engine's claim on an endpoint that allows `limit` requests in flight.

    A lease is a file that its engine keeps locked; it says how many requests in flight the engine
    claims. Claims change only under the folder's lock and never add up to more than the limit: a
    newcomer gets what the others have given up. The lock of a killed engine falls, and with it the
    lease. The file of an engine that is idle has another name, and nobody counts it.
    """

    folder: Path
    limit: int

    def __post_init__(self) -> None:
        self._claim, self._fd = 0, -1
        name = f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(3).hex()}{_BUSY}"
        self._path = self.folder / name

    def __enter__(self) -> Self:
        with self._folder_lock():
            self._fd = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._write()
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def refresh(self, in_flight: int, *, is_idle: bool = False) -> Share:
        """Claim this engine's share as far as the others leave it; what is in flight stays."""
        with self._folder_lock():
            if is_idle != (self._path.suffix == _IDLE):
                self._path = self._path.rename(self._path.with_suffix(_IDLE if is_idle else _BUSY))
            if is_idle:
                self._claim = 0
                self._write()
                return Share(0, 0)
            others = dict(self._others())
            rank = sum(name < self._path.name for name in others)
            whole, rest = divmod(self.limit, len(others) + 1)
            target = whole + (rank < rest)
            free = int((1 - sum(others.values())) * self.limit)
            self._claim = max(min(target, free), min(in_flight, self._claim))
            self._write()
        return Share(self._claim, target)

    def _others(self) -> Iterator[tuple[str, Fraction]]:
        """The claims of living engines as parts of the whole; the leases of dead ones go."""
        for path in (*self.folder.glob(f"*{_BUSY}"), *self.folder.glob(f"*{_IDLE}")):
            if path == self._path:
                continue
            try:
                fd = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                if path.suffix == _BUSY and (text := os.pread(fd, 64, 0).decode()):
                    claim, limit = text.split()
                    yield path.name, Fraction(int(claim), int(limit))
            finally:
                os.close(fd)

    def _write(self) -> None:
        os.pwrite(self._fd, f"{self._claim:10d} {self.limit:10d}\n".encode(), 0)

    @contextmanager
    def _folder_lock(self) -> Generator[None]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


@dataclass(eq=False, repr=False)
class Channel:
    """A transport with its limits (None is no limit), its lease among engines, and its health.

    An endpoint that fails again and again is left out for a while, then probed by one request;
    one that refuses the key or the model is left out for good (`refusal`).
    """

    transport: HttpTransport
    max_in_flight: int
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    lease: Lease | None = None
    is_declared: bool = True
    """Whether `max_in_flight` is the endpoint's own limit, and not only the run's."""
    in_flight: int = field(default=0, init=False)
    refusal: str | None = field(default=None, init=False)
    has_answered: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.name = self.transport.name
        self.share = self.max_in_flight
        """Requests in flight that this engine may have."""
        self._window = Window(self.max_in_flight)
        per_minute = (self.requests_per_minute, self.tokens_per_minute)
        buckets = (None if each is None else Bucket(each) for each in per_minute)
        self.requests, self.tokens = buckets
        self._forbidden = self._failures = 0
        self._ejection_s = FIRST_EJECTION_S
        self.ejected_until: float | None = None
        self.is_probed = False

    def look_at_others(self, now: float, *, is_idle: bool) -> bool:
        """Take this engine's share, none for one that `is_idle`; False while others still have to
        make room."""
        if self.lease is None:
            return True
        claim, target = self.lease.refresh(self.in_flight, is_idle=is_idle)
        self.share = min(claim, target)
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.share(self.share / self.max_in_flight, now)
        return claim == target

    def widen(self, most: int) -> None:
        """For a run that may ask more at a time, where the endpoint says nothing against it."""
        if not self.is_declared and most > self.max_in_flight:
            self.max_in_flight, self._window = most, Window(most)
            if self.lease is None:
                self.share = most
            else:
                self.lease.limit = most

    def load(self) -> float:
        """0 is idle, 1 is full."""
        cap = min(self.share, self._window.cap)
        return self.in_flight / cap if cap else 1.0

    def wait(self, tokens: int, now: float) -> float | None:
        """Seconds until a request may start: 0 is now, None is "when another one ends"."""
        if self.refusal is not None:
            return None
        if self.ejected_until is not None:
            if self.is_probed:
                return None
            if now < self.ejected_until:
                return self.ejected_until - now
        if self.in_flight >= min(self.share, self._window.cap):
            return None
        wait = self.requests.wait(1, now) if self.requests else 0.0
        return max(wait, self.tokens.wait(tokens, now)) if self.tokens else wait

    def replied(self, verdict: Verdict, started: float, now: float, *, may_eject: bool) -> Verdict:
        """Learn from a reply; tell what it means here. `may_eject`: there is another endpoint."""
        if isinstance(verdict, Refused) and verdict.record is not None:
            verdict = self._forbids(verdict, verdict.record)
        match verdict:
            case Answer() | Failure():
                if isinstance(verdict, Answer):
                    self.has_answered, self._forbidden = True, 0
                self._failures, self.ejected_until = 0, None
                self.is_probed, self._ejection_s = False, FIRST_EJECTION_S
                self._window.answered(now, self.in_flight, now - started)
            case Refused(detail, record):
                self.is_probed = False
                self.refusal = detail if record is None else None
            case TryAgain(failure, after_s, busy):
                self._window.failed(now, self.in_flight - 1, busy=busy, after_s=after_s or 0.0)
                self._failures += failure.reason is not Reason.RATE_LIMITED
                if may_eject and (self.is_probed or self._failures >= EJECT_AFTER):
                    if self.is_probed:
                        self._ejection_s = min(LONGEST_EJECTION_S, self._ejection_s * 2)
                    self.is_probed = False
                    self.ejected_until = now + self._ejection_s
        return verdict

    def _forbids(self, refused: Refused, record: Failure) -> Verdict:
        """What it is about: the record once the endpoint has answered others, else the key. As
        it came, when the first answer may still be on its way."""
        self._forbidden += 1
        if self._forbidden >= max(FORBIDDEN_IN_A_ROW, 2 * self.in_flight):
            return Refused(refused.detail)
        if self.has_answered:
            return record
        return refused if self.in_flight > 1 else Refused(refused.detail)


def held_up(waits: Sequence[tuple[float, str]], now: float) -> str:
    """`64 wait after 429 rate_limited from host:1, next try in 12 s`; until when, and why, is given
    of each."""
    if not waits:
        return ""
    reasons = ", ".join(why for why, _ in Counter(why for _, why in waits).most_common(3))
    seconds = ceil(max(0.0, min(waits)[0] - now))
    return f"{len(waits):,} wait after {reasons}, next try in {seconds} s"


def is_down(channel: Channel, failed: int, last: Failure) -> EndpointDown:
    return EndpointDown(
        f"{channel.name}: {failed} records in a row failed and none was answered; "
        f"the last: {last.reason}: {last.detail}. "
        "Mend that and run the task again: what was answered is kept"
    )


def all_refuse(channels: Sequence[Channel]) -> EndpointRefused | None:
    """When no endpoint is left."""
    if any(channel.refusal is None for channel in channels):
        return None
    refusals = (f"{each.name} refuses every request: {each.refusal}" for each in channels)
    return EndpointRefused(
        f"{'; '.join(refusals)}. "
        "Check api_key, model and base_url in the model file, and the account's quota"
    )
