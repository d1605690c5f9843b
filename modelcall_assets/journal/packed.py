# pyright: standard
# (pyarrow has no types)
"""A segment of compressed lines: blocks of about 256 KiB, each behind a table of its replies.

The file is a sequence of zstd frames, so that `zstd -dc` shows the lines. Before each block
stands a frame that decoders skip, with what the index needs; the first one says what the file
replaces:

    frame    magic, size of content; integers are little-endian
    first    {"format": 2, "replaces": [names of segments]}
    table    packed size, raw size, end of the last seal in the block or 0, then the replies' hashes
             and their offsets in the block
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.errors import InputError
from modelcall_assets.journal.lines import FORMAT, SEAL, kind_of
from modelcall_assets.storage.files import NewFile

PACKED_SUFFIX = ".jsonl.zst"
BLOCK_BYTES = 256 << 10
CACHED_BYTES = 8 << 20
_SKIPPED = 0x184D2A50
_FRAME = struct.Struct("<II")
_TABLE = struct.Struct("<QQQ")
_COPY_BYTES = 1 << 20


class PackWriter:
    """Writes a packed segment; close it to have all of it in the file."""

    def __init__(self, file: NewFile, replaces: Sequence[str]) -> None:
        self._file = file
        self._codec: Any = pa.Codec("zstd")
        self._start = 0
        self._new_block()
        self._write_skipped(orjson.dumps({"format": FORMAT, "replaces": replaces}))

    def copy(self, segment: PackedSegment) -> None:
        """Take over all blocks as they are; only before anything else."""
        assert self._start == self._size == 0
        for part in segment.blocks():
            self._file.write(part)
        self._start = segment.size

    def add(self, line: bytes) -> int:
        """The offset of the line."""
        if self._size >= BLOCK_BYTES:
            self._end_block()
        offset, kind = self._size, kind_of(line)
        self._lines.append(line)
        self._size += len(line)
        if kind == SEAL:
            self._sealed = self._size
        elif kind >= 0:
            self._hashes.append(kind)
            self._offsets.append(offset)
        return self._start + offset

    def close(self) -> None:
        if self._size:
            self._end_block()

    def _new_block(self) -> None:
        self._lines: list[bytes] = []
        self._hashes, self._offsets = array("I"), array("Q")
        self._size = self._sealed = 0

    def _end_block(self) -> None:
        packed: bytes = self._codec.compress(b"".join(self._lines), asbytes=True)
        table = _TABLE.pack(len(packed), self._size, self._sealed)
        self._write_skipped(table + self._hashes.tobytes() + self._offsets.tobytes())
        self._file.write(packed)
        self._start += self._size
        self._new_block()

    def _write_skipped(self, content: bytes) -> None:
        self._file.write(_FRAME.pack(_SKIPPED, len(content)) + content)


class PackedSegment:
    """Offsets are those of the uncompressed lines. Reading in about their order is cheap."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._codec: Any = pa.Codec("zstd")
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cached = 0
        self._starts, self._places = array("Q", [0]), array("Q")
        """Of each block, and the end of the last."""
        self._fd = os.open(path, os.O_RDONLY)
        try:
            self._find_blocks()
        except InputError:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._starts[-1]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Offset and text of each line."""
        for number, start in enumerate(self._starts[:-1]):
            for line in BytesIO(self._block(number)):
                yield start, line
                start += len(line)

    def scan(self) -> Iterator[tuple[int, int]]:
        """Offset and kind of each reply and, of a block's seals, the last."""
        for start, place in zip(self._starts[:-1], self._places[:-1], strict=True):
            content = self._table(place)
            _, _, sealed = _TABLE.unpack_from(content)
            count = (len(content) - _TABLE.size) // 12
            hashes, offsets = array("I"), array("Q")
            hashes.frombytes(content[_TABLE.size : _TABLE.size + 4 * count])
            offsets.frombytes(content[_TABLE.size + 4 * count :])
            yield from ((start + at, hash_) for at, hash_ in zip(offsets, hashes, strict=True))
            if sealed:
                yield start + sealed - 1, SEAL

    def line(self, offset: int) -> bytes:
        number = bisect_right(self._starts, offset) - 1
        block, at = self._block(number), offset - self._starts[number]
        return block[at : block.index(b"\n", at) + 1]

    def blocks(self) -> Iterator[bytes]:
        """All after the first frame, as it is in the file."""
        place, end = self._places[0], self._places[-1]
        while place < end:
            part = os.pread(self._fd, min(_COPY_BYTES, end - place), place)
            yield part
            place += len(part)

    def close(self) -> None:
        os.close(self._fd)

    def _find_blocks(self) -> None:
        place, end = _header(self.path)[1], os.fstat(self._fd).st_size
        self._places.append(place)
        while place < end:
            head = os.pread(self._fd, _FRAME.size + _TABLE.size, place)
            if len(head) < _FRAME.size + _TABLE.size:
                break
            _, size = _FRAME.unpack_from(head)
            packed, raw, _ = _TABLE.unpack_from(head, _FRAME.size)
            place += _FRAME.size + size + packed
            self._places.append(place)
            self._starts.append(self._starts[-1] + raw)
        if place != end:
            raise _damaged(self.path)

    def _table(self, place: int) -> bytes:
        _, size = _FRAME.unpack(os.pread(self._fd, _FRAME.size, place))
        return os.pread(self._fd, size, place + _FRAME.size)

    def _block(self, number: int) -> bytes:
        """The lines of a block; those used last stay in memory."""
        if (block := self._cache.get(number)) is not None:
            self._cache.move_to_end(number)
            return block
        place, raw = self._places[number], self._starts[number + 1] - self._starts[number]
        data = memoryview(os.pread(self._fd, self._places[number + 1] - place, place))
        _, size = _FRAME.unpack_from(data)
        block = self._codec.decompress(data[_FRAME.size + size :], raw, asbytes=True)
        self._cache[number] = block
        self._cached += len(block)
        while self._cached > CACHED_BYTES and len(self._cache) > 1:
            self._cached -= len(self._cache.popitem(last=False)[1])
        return block


def replaced_by(path: Path) -> list[str]:
    """The names of the segments that are in this one."""
    return _header(path)[0]["replaces"]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The first frame's content and its end in the file. InputError when this cannot read it."""
    with path.open("rb") as file:
        magic, size = _FRAME.unpack(file.read(_FRAME.size).ljust(_FRAME.size, b"\0"))
        content = file.read(size)
    if magic != _SKIPPED or len(content) < size:
        raise _damaged(path)
    header = orjson.loads(content)
    if header["format"] > FORMAT:
        raise InputError(f"{path}: written by a newer version of modelcall; use that one")
    return header, _FRAME.size + size


def _damaged(path: Path) -> InputError:
    return InputError(
        f"{path}: damaged; bring it back from a copy, or take it away and its replies are asked "
        "for again"
    )
