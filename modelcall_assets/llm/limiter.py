"""How fast one endpoint may be asked: requests in flight, requests and tokens per minute.

Nothing here waits or reads a clock: `now` is always given, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST_ROUND_S, LONGEST_ROUND_S = 0.1, 1.0
"""Time between two looks at an endpoint's replies; between these, as long as a request takes."""
STRAY_SHARE = 0.1
"""Of a round's replies. More that are "too busy" say that the window is too large."""
GROW_EVERY_S = 1.0
SLOWEST_GROWTH = 1 / 32
FASTEST_GROWTH = 1 / 2
"""Of the window, at a time; doubles from one time to the next."""

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Limits:
    """What an endpoint allows; None is no limit."""

    max_in_flight: int
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Bucket:
    """Holds a second's worth and refills in 61: any minute lets out at most `per_minute`, and
    what a single taking larger than the whole bucket is over it."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute = per_minute
        self._size = self._level = per_minute / 61
        self._at = now

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
        return lacking / self._size if lacking > _ROUNDING else 0.0

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
        self._size = float(largest)
        self._largest = largest
        self._growth = SLOWEST_GROWTH
        self._replies = self._busy = 0
        self._is_ill = False
        self._latency_s = LONGEST_ROUND_S
        self._round_from = self._grown_at = self._calm_from = float("-inf")

    @property
    def cap(self) -> int:
        return max(1, int(self._size) - self._busy)

    def answered(self, now: float, in_flight: int, latency_s: float) -> None:
        self._latency_s += (latency_s - self._latency_s) / 16
        if self._busy or self._size < self._largest:
            self._count(now, in_flight)

    def failed(self, now: float, in_flight: int, *, busy: bool, after_s: float) -> None:
        """No answer; `busy` when the endpoint had too much to do. No growth for `after_s`."""
        if busy and not self._busy:
            self._replies, self._round_from = 0, now
        self._busy += busy
        self._is_ill = True
        self._calm_from = max(self._calm_from, now + after_s)
        self._count(now, in_flight)

    def _count(self, now: float, in_flight: int) -> None:
        self._replies += 1
        round_s = min(LONGEST_ROUND_S, max(SHORTEST_ROUND_S, self._latency_s))
        if now - self._round_from >= round_s:
            self._adjust(now, in_flight)

    def _adjust(self, now: float, in_flight: int) -> None:
        share = self._busy / self._replies
        if share > STRAY_SHARE:
            self._size = min(self._size, max(1.0, self._size * (1 - share / 2), in_flight))
        if self._is_ill:
            self._growth, self._grown_at = SLOWEST_GROWTH, now
        elif now >= max(self._calm_from, self._grown_at + GROW_EVERY_S):
            self._size = min(self._largest, self._size * (1 + self._growth) + 0.5)
            self._growth, self._grown_at = min(FASTEST_GROWTH, self._growth * 2), now
        self._replies = self._busy = 0
        self._is_ill = False
        self._round_from = now


class Limiter:
    """The limits of one endpoint for one engine, which has a share of them."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.in_flight = 0
        self.share = limits.max_in_flight
        """Requests in flight that this engine may have."""
        self._limits = limits
        self._window = Window(limits.max_in_flight)
        self._requests = _bucket(limits.requests_per_minute, now)
        self._tokens = _bucket(limits.tokens_per_minute, now)
        self._has_rates = self._requests is not None or self._tokens is not None

    @property
    def cap(self) -> int:
        """Requests in flight allowed at this time."""
        return min(self.share, self._window.cap)

    @property
    def load(self) -> float:
        """0 is idle, 1 is full."""
        cap = self.cap
        return self.in_flight / cap if cap else 1.0

    def set_share(self, share: int, rate_share: float, now: float) -> None:
        """Requests in flight, and the fraction of the rates, that are this engine's own."""
        self.share = share
        for bucket in (self._requests, self._tokens):
            if bucket is not None:
                bucket.share(rate_share, now)

    def wait(self, tokens: int, now: float) -> float:
        """Seconds until a free slot could be used for a request of so many tokens."""
        if not self._has_rates:
            return 0.0
        requests = self._requests.wait(1, now) if self._requests else 0.0
        return max(requests, self._tokens.wait(tokens, now) if self._tokens else 0.0)

    def start(self, tokens: int, now: float) -> None:
        """Take a slot and reserve the tokens."""
        self.in_flight += 1
        if self._requests is not None:
            self._requests.take(1, now)
        if self._tokens is not None:
            self._tokens.take(tokens, now)

    def finish(self) -> None:
        """Give the slot back."""
        self.in_flight -= 1

    def settle(self, reserved: int, used: int) -> None:
        """Replace the reservation by what the endpoint counted."""
        if self._tokens is not None:
            self._tokens.give_back(reserved - used)

    def answered(self, now: float, latency_s: float) -> None:
        """A request was answered, well or badly."""
        self._window.answered(now, self.in_flight, latency_s)

    def failed(self, now: float, *, busy: bool, after_s: float) -> None:
        """It was not; `busy` when the endpoint has too much to do."""
        self._window.failed(now, self.in_flight - 1, busy=busy, after_s=after_s)


def _bucket(per_minute: int | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now)
