# pyright: standard
# (pyarrow has no types)
"""A segment of compressed lines: blocks of about 256 KiB, each behind a table of its replies.

The file is a sequence of zstd frames, so that `zstd -dc` shows the lines. Before each block
stands a frame that decoders skip, with what the index needs; the first one says what the file
replaces:

    frame    magic, size of content; integers are little-endian
    first    {"format": 3, "replaces": [names of segments]}, with a checksum as a line has
    table    CRC-32 of what follows, packed size, raw size, end of the last seal in the block or 0,
             start of the block among all lines, then the replies' hashes and their offsets in it

A block behind a damaged table is read all the same, and of a damaged block what can be. Format 2
has neither checksum nor start.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from shutil import copyfileobj
from typing import Any, NamedTuple
from zlib import crc32

import orjson
import pyarrow as pa

from modelcall_assets.errors import InputError
from modelcall_assets.journal.lines import FORMAT, SEAL, Lines, content_end, line_of
from modelcall_assets.storage.files import NewFile

PACKED_SUFFIX = ".jsonl.zst"
BLOCK_BYTES = 256 << 10
CACHED_BYTES = 8 << 20
_SKIPPED = 0x184D2A50
_FRAME = struct.Struct("<II")
_TABLE, _OLD_TABLE = struct.Struct("<IQQQQ"), struct.Struct("<QQQ")
_CRC = struct.Struct("<I")
_STEP_BYTES = 1 << 12
_UNREADABLE = (OSError, pa.ArrowException, MemoryError, OverflowError)
_COMPRESSED = b"\x28\xb5\x2f\xfd"
"""Begins a frame that is none to skip."""


class _Table(NamedTuple):
    begin: int
    packed: int
    raw: int
    sealed: int
    start: int
    hashes: Sequence[int]
    offsets: Sequence[int]


class _Block(NamedTuple):
    """Where in the file it is, compressed; its size; where its table begins if that is sound."""

    begin: int
    end: int
    raw: int
    table: int | None


class PackWriter:
    """Writes a packed segment; all of it is in the file when its last block is ended."""

    def __init__(self, file: NewFile, replaces: Sequence[str]) -> None:
        self._file, self._start = file, 0
        self._codec: Any = pa.Codec("zstd")
        self._new_block()
        self._write_skipped(line_of({"format": FORMAT, "replaces": replaces}))

    def copy(self, segment: PackedSegment) -> None:
        """Take over all blocks as they are; only before anything else."""
        assert self._start == self._size == 0
        with segment.path.open("rb") as file:
            file.seek(segment.first)
            copyfileobj(file, self._file)
        self._start = segment.size

    def add(self, line: bytes, kind: int) -> int:
        if self._size >= BLOCK_BYTES:
            self.end_block()
        offset = self._size
        self._lines.append(line)
        self._size += len(line)
        if kind == SEAL:
            self._sealed = self._size
        elif kind >= 0:
            self._hashes.append(kind)
            self._offsets.append(offset)
        return self._start + offset

    def _new_block(self) -> None:
        self._lines: list[bytes] = []
        self._hashes, self._offsets = array("I"), array("Q")
        self._size = self._sealed = 0

    def end_block(self) -> None:
        if not self._size:
            return
        packed: bytes = self._codec.compress(b"".join(self._lines), asbytes=True)
        head = _TABLE.pack(0, len(packed), self._size, self._sealed, self._start)[_CRC.size :]
        table = head + self._hashes.tobytes() + self._offsets.tobytes()
        self._write_skipped(_CRC.pack(crc32(table)) + table)
        self._file.write(packed)
        self._start += self._size
        self._new_block()

    def _write_skipped(self, content: bytes) -> None:
        self._file.write(_FRAME.pack(_SKIPPED, len(content)) + content)


class PackedSegment:
    """Offsets are those of the uncompressed lines. Reading in about their order is cheap."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        """Places of the file that are; after `lines`, its lines."""
        self._codec: Any = pa.Codec("zstd")
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._cached = 0
        header, self.first = _header(path)
        self._is_old = header is not None and header["format"] < FORMAT
        self._blocks: list[_Block] = []
        self._starts = array("Q")
        """Of each among the lines."""
        self._fd = os.open(path, os.O_RDONLY)
        self._end = os.fstat(self._fd).st_size
        self._find_blocks(is_damaged=header is None)

    @property
    def size(self) -> int:
        return self._starts[-1] + self._blocks[-1].raw if self._blocks else 0

    @property
    def is_whole(self) -> bool:
        """Whether its blocks can be copied as they are."""
        return not self._is_old and not self.damaged

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Offset, kind and text of each sound line."""
        damaged = self.damaged
        for number, start in enumerate(self._starts):
            lines, replies = Lines(BytesIO(self._block(number))), 0
            for at, kind, line in lines:
                replies += kind >= 0
                yield start + at, kind, line
            table = self._table(self._blocks[number].table)
            damaged += max(lines.damaged, len(table.offsets) - replies if table else 0)
        self.damaged = damaged

    def scan(self) -> Iterator[tuple[int, int]]:
        """Offset and kind of each reply and, of a block's seals, the last. Damaged lines too."""
        for number, start in enumerate(self._starts):
            if (table := self._table(self._blocks[number].table)) is None:
                lines = Lines(BytesIO(self._block(number)))
                yield from ((start + at, kind) for at, kind, _ in lines)
                continue
            pairs = zip(table.offsets, table.hashes, strict=True)
            yield from ((start + at, hash_) for at, hash_ in pairs)
            if table.sealed:
                yield start + table.sealed - 1, SEAL

    def line(self, offset: int) -> bytes:
        """Empty where its block could not be read so far."""
        number = bisect_right(self._starts, offset) - 1
        block, at = self._block(number), offset - self._starts[number]
        return block[at : block.find(b"\n", at) + 1]

    def close(self) -> None:
        os.close(self._fd)

    def _find_blocks(self, *, is_damaged: bool) -> None:
        at = sound = self.first
        while at < self._end:
            table = self._table(at)
            if table is None:
                with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as data:
                    found = data.find(_SKIPPED.to_bytes(4, "little"), at + 1)
                is_damaged, at = True, self._end if found < 0 else found
                continue
            if is_damaged:
                self._mend(sound, at)
            end = table.begin + table.packed
            self._starts.append(table.start)
            self._blocks.append(_Block(table.begin, end, table.raw, at))
            at = sound = end
            is_damaged = end > self._end
        if is_damaged:
            self._mend(sound, self._end)

    def _mend(self, begin: int, end: int) -> None:
        """Find blocks whose tables are damaged. How many replies a table had, its size says."""
        data = os.pread(self._fd, max(0, end - begin), begin)
        magic, size = _FRAME.unpack(data[: _FRAME.size].ljust(_FRAME.size))
        is_table = magic == _SKIPPED and size <= len(data)
        missing = (size - _TABLE.size) // 12 if is_table else 0
        starts = [found.start() for found in re.finditer(re.escape(_COMPRESSED), data)]
        for first, last in pairwise([*starts, len(data)]):
            if block := _readable(data[first:last]):
                missing -= sum(kind >= 0 for _, kind, _ in Lines(BytesIO(block)))
                self._starts.append(self.size)
                self._blocks.append(_Block(begin + first, begin + last, len(block), None))
        self.damaged += max(1, missing)

    def _table(self, at: int | None) -> _Table | None:
        """None when it is damaged, or lies nowhere."""
        if at is None:
            return None
        magic, size = _FRAME.unpack(os.pread(self._fd, _FRAME.size, at).ljust(_FRAME.size))
        if magic != _SKIPPED or size > self._end - at:
            return None
        content = os.pread(self._fd, size, at + _FRAME.size)
        fixed = _OLD_TABLE if self._is_old else _TABLE
        count, rest = divmod(len(content) - fixed.size, 12)
        if count < 0 or rest:
            return None
        if self._is_old:
            packed, raw, sealed, start = *fixed.unpack_from(content), self.size
        else:
            crc, packed, raw, sealed, start = fixed.unpack_from(content)
            if crc != crc32(content[_CRC.size :]):
                return None
        hashes, offsets = array("I"), array("Q")
        hashes.frombytes(content[fixed.size : fixed.size + 4 * count])
        offsets.frombytes(content[fixed.size + 4 * count :])
        begin = at + _FRAME.size + size
        return _Table(begin, packed, raw, sealed, start, hashes, offsets)

    def _block(self, number: int) -> bytes:
        """The lines of a block, as far as they can be read; those used last stay in memory."""
        if (block := self._cache.get(number)) is not None:
            self._cache.move_to_end(number)
            return block
        begin, end, raw, _ = self._blocks[number]
        data = os.pread(self._fd, end - begin, begin)
        try:
            block = self._codec.decompress(data, raw, asbytes=True)
        except _UNREADABLE:
            block = _readable(data)
        self._cache[number] = block
        self._cached += len(block)
        while self._cached > CACHED_BYTES and len(self._cache) > 1:
            self._cached -= len(self._cache.popitem(last=False)[1])
        return block


def replaced_by(path: Path) -> list[str]:
    header, _ = _header(path)
    return header["replaces"] if header else []


def _header(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The first frame's content, None when it is damaged, and its end. InputError when newer."""
    with path.open("rb") as file:
        magic, size = _FRAME.unpack(file.read(_FRAME.size).ljust(_FRAME.size, b"\0"))
        content = file.read(size) if magic == _SKIPPED else b""
    is_old = not content.endswith(b"\n")
    try:
        header = orjson.loads(content) if is_old or content_end(content) else None
    except orjson.JSONDecodeError:
        return None, 0
    if not isinstance(header, dict) or header.keys() - {"crc"} != {"format", "replaces"}:
        return None, 0
    if is_old and header["format"] not in (1, 2):
        return None, 0
    if header["format"] > FORMAT:
        raise InputError(f"{path}: written by a newer version of modelcall; use that one")
    return header, _FRAME.size + size


def _readable(data: bytes) -> bytes:
    """What the frame at the beginning holds, up to the byte where it is damaged."""
    read = bytearray()
    for step in (_STEP_BYTES, 1):
        stream = pa.CompressedInputStream(pa.BufferReader(data), "zstd")
        with suppress(*_UNREADABLE):
            stream.read(len(read))
            while part := stream.read(step):
                read += part
    return bytes(read)
