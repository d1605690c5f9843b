"""One endpoint as an engine sees it: how busy it is, and whether it answers at all."""

from __future__ import annotations

from modelcall_assets.llm.classify import Answered, BadRecord, Refused, TryAgain, Verdict
from modelcall_assets.llm.lease import Lease
from modelcall_assets.llm.limiter import Limiter, Limits
from modelcall_assets.llm.transport import Transport
from modelcall_assets.records.outcome import Failure, Reason

EJECT_AFTER = 5
"""Failures in a row, with no answer between."""
FIRST_EJECTION_S = 1.0
LONGEST_EJECTION_S = 60.0
FORBIDDEN_IN_A_ROW = 25
"""So many of FORBIDDEN_STATUS with no answer between, and twice as many as requests are in flight,
are the endpoint's refusal. A slow answer may be overtaken by many of them."""


class Channel:
    """A transport with its limits, its lease among engines, and its health.

    An endpoint that fails again and again is left out for a while, then probed by one request;
    one that refuses the key or the model is left out for good (`refusal`).
    """

    def __init__(self, transport: Transport, limits: Limits, lease: Lease | None = None) -> None:
        self.transport = transport
        self.refusal: str | None = None
        self._limits = limits
        self._lease = lease
        self.has_answered = False
        self._forbidden = 0
        self._failures = 0
        self._ejection_s = FIRST_EJECTION_S
        self._ejected_until: float | None = None
        self._is_probed = False

    @property
    def name(self) -> str:
        return self.transport.name

    @property
    def is_leased(self) -> bool:
        return self._lease is not None

    @property
    def counts_tokens(self) -> bool:
        return self._limits.tokens_per_minute is not None

    def open(self, now: float) -> None:
        """Call once, before anything else."""
        self.limiter = Limiter(self._limits, now)
        if self._lease is not None:
            self._lease.__enter__()

    def close(self) -> None:
        if self._lease is not None:
            self._lease.__exit__(None, None, None)

    def share(self, now: float) -> bool:
        """Look how many engines there are; False while others still have to make room."""
        if self._lease is None:
            return True
        share = self._lease.refresh(self.limiter.in_flight)
        self.limiter.set_share(min(share.claim, share.target), share.of_rates, now)
        return share.is_settled

    def wait(self, tokens: int, now: float) -> float | None:
        """Seconds until a request may start: 0 is now, None is "when another one ends"."""
        if self.refusal is not None:
            return None
        if self._ejected_until is not None:
            if self._is_probed:
                return None
            if now < self._ejected_until:
                return self._ejected_until - now
        if self.limiter.in_flight >= self.limiter.cap:
            return None
        return self.limiter.wait(tokens, now)

    def start(self, tokens: int, now: float) -> None:
        """A request starts; to an ejected endpoint it is the probe."""
        self._is_probed = self._ejected_until is not None
        self.limiter.start(tokens, now)

    def replied(self, verdict: Verdict, started: float, now: float, *, may_eject: bool) -> Verdict:
        """Learn from a reply and tell what it means here. `may_eject`: there is another endpoint to
        turn to."""
        if isinstance(verdict, Refused) and verdict.record is not None:
            verdict = self._forbids(verdict, verdict.record)
        match verdict:
            case Answered() | BadRecord():
                if isinstance(verdict, Answered):
                    self.has_answered, self._forbidden = True, 0
                self._failures, self._ejected_until = 0, None
                self._is_probed, self._ejection_s = False, FIRST_EJECTION_S
                self.limiter.answered(now, now - started)
            case Refused(detail, record):
                self._is_probed = False
                self.refusal = detail if record is None else None
            case TryAgain(failure, after_s, busy):
                self.limiter.failed(now, busy=busy, after_s=after_s or 0.0)
                self._failures += failure.reason is not Reason.RATE_LIMITED
                if may_eject and (self._is_probed or self._failures >= EJECT_AFTER):
                    self._eject(now)
        return verdict

    def _forbids(self, refused: Refused, record: Failure) -> Verdict:
        """What it is about: the record once the endpoint has answered others, else the key. As
        it came, when the first answer may still be on its way."""
        in_flight = self.limiter.in_flight
        self._forbidden += 1
        if self._forbidden >= max(FORBIDDEN_IN_A_ROW, 2 * in_flight):
            return Refused(refused.detail)
        if self.has_answered:
            return BadRecord(record)
        return refused if in_flight > 1 else Refused(refused.detail)

    def interrupted(self) -> None:
        """A request ended without a reply; if it was the probe, the next one is."""
        self._is_probed = False

    def _eject(self, now: float) -> None:
        if self._is_probed:
            self._ejection_s = min(LONGEST_EJECTION_S, self._ejection_s * 2)
        self._is_probed = False
        self._ejected_until = now + self._ejection_s
