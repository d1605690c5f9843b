"""How long an engine waits."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Patience:
    """All in seconds."""

    busy_s: float = 900.0
    """How long one record keeps trying while the endpoint only says that it is busy; an endpoint
    that asks for a longer wait is not waited for."""
    first_call_alone_s: float = 0.25
    """A wrong key or model costs one call: the others wait this long for the first answer."""
    until_one_answers_s: float = 0.5
    base_s: float = 0.5
    cap_s: float = 60.0

    def backoff(self, attempt: int, after_s: float | None) -> float:
        """Until the next attempt: exponential with full jitter; never shorter than what the
        server asked for."""
        spread = random.uniform(0, min(self.cap_s, self.base_s * 2 ** min(attempt - 1, 30)))
        if after_s is None:
            return spread
        return after_s + min(spread, (0.1 + attempt / 50) * (after_s + 1))


PATIENCE = Patience()
