"""Which texts were met before, in about 9 bytes each."""

from __future__ import annotations

from modelcall_assets.journal.index import PLACE_BITS, Words

_MASK = (1 << 64) - 1


class Seen:
    """Told apart by 64 bits, which among 100 million differ but for one chance in 3,000."""

    def __init__(self) -> None:
        self._words = Words(0)

    def is_new(self, text: str) -> bool:
        hash_ = hash(text) & _MASK
        return self._words.add(hash_, hash_ >> PLACE_BITS)
