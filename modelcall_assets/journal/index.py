"""Where the replies to an address lie."""

from __future__ import annotations

from bisect import bisect_left, insort

from modelcall_assets.journal.words import PLACE_BITS, Words

_POSITION_BITS = 40
HASH_BITS = 64 - _POSITION_BITS + PLACE_BITS
_POSITION_MASK = (1 << _POSITION_BITS) - 1


class Index:
    """Positions by a hash of HASH_BITS bits: about 9 bytes a reply. What is found has to be
    compared with what was looked for, because two addresses may have one hash."""

    def __init__(self) -> None:
        self._words = Words(_POSITION_BITS)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, hash_: int, position: int) -> None:
        insort(self._words.bucket(hash_), hash_ >> PLACE_BITS << _POSITION_BITS | position)
        self._words.grow()
        self._count += 1

    def find(self, hash_: int) -> list[int]:
        """Positions in ascending order."""
        bucket = self._words.bucket(hash_)
        first = hash_ >> PLACE_BITS << _POSITION_BITS
        start = bisect_left(bucket, first)
        end = bisect_left(bucket, first + _POSITION_MASK + 1, start)
        return [word & _POSITION_MASK for word in bucket[start:end]]
