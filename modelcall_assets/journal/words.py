"""A set of 64-bit numbers that costs little more than 8 bytes each and never grows in a leap."""

from __future__ import annotations

from array import array
from bisect import bisect_left

PLACE_BITS = 6
_PER_BUCKET = 128


class Words:
    """Sorted buckets of words. A word is `hash >> PLACE_BITS << payload_bits | payload`.

    Grows by linear hashing: every now and then one bucket is split, so that nothing is rebuilt and
    the old and the new table never exist side by side.
    """

    def __init__(self, payload_bits: int) -> None:
        self._level = PLACE_BITS
        self._split = 0
        self._room = _PER_BUCKET << PLACE_BITS
        self._payload_bits = payload_bits
        self._buckets = [array("Q") for _ in range(1 << PLACE_BITS)]

    def bucket(self, hash_: int) -> array[int]:
        """Where words of this hash are. Call `grow` after an insertion."""
        place = hash_ & (1 << self._level) - 1
        if place < self._split:
            place = hash_ & (2 << self._level) - 1
        return self._buckets[place]

    def add(self, hash_: int, word: int) -> bool:
        """False when the word is there already."""
        bucket = self.bucket(hash_)
        place = bisect_left(bucket, word)
        if place < len(bucket) and bucket[place] == word:
            return False
        bucket.insert(place, word)
        self.grow()
        return True

    def grow(self) -> None:
        """Make room for one word more."""
        self._room -= 1
        if self._room >= 0:
            return
        self._room += _PER_BUCKET
        shift = self._payload_bits + self._level - PLACE_BITS
        old, buckets = self._buckets[self._split], self._buckets
        buckets[self._split] = array("Q", [word for word in old if not word >> shift & 1])
        buckets.append(array("Q", [word for word in old if word >> shift & 1]))
        self._split += 1
        if self._split == 1 << self._level:
            self._level, self._split = self._level + 1, 0
