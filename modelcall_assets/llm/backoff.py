"""How long to wait before a request is sent again."""

from __future__ import annotations

import random

BASE_S = 0.5
CAP_S = 60.0


def backoff(attempt: int, after_s: float | None) -> float:
    """Seconds until the next attempt: exponential with full jitter; never shorter than what the
    server asked for."""
    spread = random.uniform(0, min(CAP_S, BASE_S * 2 ** min(attempt - 1, 30)))
    if after_s is None:
        return spread
    return after_s + min(spread, (0.1 + attempt / 50) * (after_s + 1))
