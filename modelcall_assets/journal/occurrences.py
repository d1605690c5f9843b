"""How often each request key was met: rows of one file that ask the same have replies each."""

from __future__ import annotations

from bisect import bisect_left

from modelcall_assets.journal.lines import Address
from modelcall_assets.journal.words import PLACE_BITS, Words

_COUNT_BITS = 8
_MOST = (1 << _COUNT_BITS) - 1
_HASH_DIGITS = 16
_HASH_MASK = (1 << 64 - _COUNT_BITS + PLACE_BITS) - 1


class Occurrences:
    """About 9 bytes per distinct key.

    Keys are told apart by 62 bits, which among 10 million differ but for one chance in 90,000. The
    count would then still be the same in every run over the same rows.
    """

    def __init__(self) -> None:
        self._words = Words(_COUNT_BITS)
        self._often: dict[int, int] = {}
        """Times met beyond what fits a word."""

    def next(self, key: str) -> int:
        """How often the key (hex digits) was met before; this time counts from now on."""
        hash_ = int(key[:_HASH_DIGITS], 16) & _HASH_MASK
        bucket = self._words.bucket(hash_)
        first = hash_ >> PLACE_BITS << _COUNT_BITS
        place = bisect_left(bucket, first)
        if place == len(bucket) or bucket[place] > first + _MOST:
            bucket.insert(place, first)
            self._words.grow()
            return 0
        if bucket[place] < first + _MOST:
            bucket[place] += 1
            return bucket[place] - first
        self._often[hash_] = self._often.get(hash_, 0) + 1
        return _MOST + self._often[hash_]


class Addresses:
    """Of the requests of a file in input order, `samples` to a row, one behind the other."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._occurrences = Occurrences()
        self._occurrence = self._sample = 0

    def next(self, key: str) -> Address:
        """Of the next request, whose key this is."""
        if not self._sample:
            self._occurrence = self._occurrences.next(key)
        address = Address(key, self._occurrence, self._sample)
        self._sample = (self._sample + 1) % self._samples
        return address
