"""What a file holds, by its first bytes, and its content as UTF-8: lines and the objects that they
are, or one document."""

import codecs
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import orjson
import pyarrow as pa

from modelcall_assets.errors import InputError
from modelcall_assets.records import unpacked_name
from modelcall_assets.records.outcome import BadLine, Number, Row
from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.values import loads

HEAD_BYTES = 64
BLOCK_BYTES = 256 << 10
STEP_BYTES = 16 << 10
"""Decompressed at once; what is lost of the readable part when the next bytes are damaged."""
MOST_LINE_BYTES = 256 << 20
"""A longer line is a bad one, and is cut."""
MOST_DOCUMENT_BYTES = 1 << 30
MOST_RAW_CHARS = 10_000
MOST_LEVELS = 250
"""orjson reads deeper objects than it can write back."""
KINDS: dict[type[Any], str] = {
    **dict.fromkeys((int, float, Number), "a number"),
    **{list: "a list", str: "a string", bool: "a boolean", type(None): "null"},
}
_UTF8 = ("utf-8", "utf-8-sig")
_OPENING = {ord("{")}
_BLANK = codecs.BOM_UTF8 + codecs.BOM_UTF16 + b"\0 \t\r\n"
"""What may stand before the first object, in any encoding."""


class Format(StrEnum):
    LINES = "JSON lines"
    GZIP = "JSON lines in gzip"
    ZSTD = "JSON lines in zstd"
    PARQUET = "Parquet"
    ARROW = "Arrow"
    WHOLE = "whole files"
    """Each one record; what no data file is."""

    @property
    def has_columns(self) -> bool:
        return self in (Format.PARQUET, Format.ARROW)


_MAGIC = (
    *((magic, Format.PARQUET) for magic in (b"PAR1", b"PARE")),
    *((magic, Format.ARROW) for magic in (b"ARROW1", b"FEA1", b"\xff\xff\xff\xff")),
    (b"\x1f\x8b", Format.GZIP),
    (b"\x28\xb5\x2f\xfd", Format.ZSTD),
    *((bytes((first,)) + b"\x2a\x4d\x18", Format.ZSTD) for first in range(0x50, 0x60)),
)
_BY_SUFFIX = {
    **{".gz": Format.GZIP, ".zst": Format.ZSTD, ".parquet": Format.PARQUET},
    **dict.fromkeys((".arrow", ".feather"), Format.ARROW),
}
_CODECS = {Format.GZIP: "gzip", Format.ZSTD: "zstd"}
_NOT_READ = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip", b"\x04\x22\x4d\x18": "lz4"}


@dataclass(frozen=True, slots=True)
class Reading:
    """How a task reads lines: the encoding as Python names it, and what becomes of a bad one."""

    encoding: str = "utf-8"
    on_bad_line: Literal["keep", "fail"] = "keep"
    on_empty_file: Literal["accept", "fail"] = "accept"
    """Whether a file may have no line."""


OURS = Reading()
"""How the files are read that stages leave."""


class Digest(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


def format_of(place: Place) -> Format:
    """What the first bytes say, else the name. InputError when the file cannot be read."""
    with open_input(place, at_random=True) as file:
        head = file.read(HEAD_BYTES)
    known = _format_by_magic(head)
    if known is None and head.lstrip(_BLANK)[:1] == b"{":
        known = Format.LINES
    return known or _BY_SUFFIX.get(PurePosixPath(place.name.lower()).suffix, Format.LINES)


@contextmanager
def open_lines(
    place: Place,
    format_: Format,
    reading: Reading = OURS,
    content: Digest | None = None,
) -> Iterator[io.BufferedReader]:
    """The lines of a file that has no columns, decompressed, in UTF-8 without a mark at the
    beginning. A line with bytes that its encoding does not have is no UTF-8 here either. Carriage
    returns end lines where nothing else does.

    `content` is given all bytes of the file as it is stored, by the time the block has ended well.
    InputError when the file cannot be read to its end, or holds what lines cannot be read from.
    """
    with open_input(place) as stored:
        source = stored if content is None else _buffered(_heard(stored, content))
        head = source.peek(HEAD_BYTES)
        if named := next((name for magic, name in _NOT_READ.items() if head.startswith(magic)), ""):
            raise InputError(f"{place}: compressed with {named}; use gzip or zstd instead")
        lines = source
        if format_ in _CODECS:
            unpacker: Any = (  # held here, because its end closes the file
                gzip.GzipFile(fileobj=source)
                if format_ is Format.GZIP
                else pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")
            )
            lines = _buffered(_unpacked(place, unpacker, _CODECS[format_]))
            _refuse_packed(place, format_, lines)
        if reading.encoding not in _UTF8:
            lines = _buffered(_transcoded(place, lines, reading.encoding))
        head = lines.peek(HEAD_BYTES)
        if b"\n" not in head and b"}\r{" in head:
            blocks = _blocks_of(lines)
            lines = _buffered(block.replace(b"\r", b"\n") for block in blocks)
        if lines.peek(3).startswith(codecs.BOM_UTF8):
            lines.read(3)
        if unpacked_name(place.name).endswith(".json") and lines.peek(64).lstrip()[:1] == b"[":
            raise InputError(f"{place}: one JSON array; write it as one object per line")
        yield lines
        while content is not None and source.read(BLOCK_BYTES):
            pass


def line_blocks(
    lines: io.BufferedReader, size: int
) -> Iterator[tuple[Sequence[bytes], Sequence[int], int]]:
    """About `size` bytes of lines at a time: those that are not blank, without a mark at their
    beginning; the number of each, from 1; and how many blank ones were among them. In place of what
    is over `MOST_LINE_BYTES` of one stands 0xff, which is in no UTF-8."""
    before = 0
    while block := lines.read(min(size, MOST_LINE_BYTES)):
        if not block.endswith(b"\n"):
            begun = len(block) - block.rfind(b"\n") - 1
            block += (rest := lines.readline(MOST_LINE_BYTES + 1 - begun))
            if begun + len(rest) > MOST_LINE_BYTES and not rest.endswith(b"\n"):
                block += b"\xff"
                while (rest := lines.readline(BLOCK_BYTES)) and not rest.endswith(b"\n"):
                    pass
        if block.isspace():
            count = block.count(b"\n") + (not block.endswith(b"\n"))
            yield (), (), count
        else:
            found = io.BytesIO(block).readlines()
            count, numbers = len(found), range(before + 1, before + len(found) + 1)
            if {line[0] for line in found} == _OPENING:
                yield found, numbers, 0
            else:
                cleaned = (line.removeprefix(codecs.BOM_UTF8) for line in found)
                kept = [each for each in zip(cleaned, numbers, strict=True) if each[0].strip()]
                yield [line for line, _ in kept], [at for _, at in kept], count - len(kept)
        before += count


def parse_line(
    line: bytes, number: int, encoding: str = "utf-8", *, may_be_deep: bool = False
) -> Row | BadLine:
    """The object on line `number` (from 1), which is not blank. Never raises, and gives no row that
    orjson cannot write back, unless it `may_be_deep`. `encoding` is what the line was in."""
    try:
        row = loads(line)
    except orjson.JSONDecodeError as error:
        return _bad(line, _why(line, number, encoding, error))
    if not isinstance(row, dict):
        return _bad(line, f"line {number}: not an object but {KINDS[type(row)]}")
    is_safe = may_be_deep or {dict, list}.isdisjoint(map(type, row.values()))
    if is_safe or line.count(b"[") + line.count(b"{") <= MOST_LEVELS:
        return row
    try:
        orjson.dumps(row)
    except orjson.JSONEncodeError:
        return _bad(line, f"line {number}: nested deeper than {MOST_LEVELS} levels")
    return row


def clip(text: str) -> str:
    """The first 10,000 characters, with a note of what is missing."""
    if len(text) <= MOST_RAW_CHARS:
        return text
    return f"{text[:MOST_RAW_CHARS]}… [{len(text) - MOST_RAW_CHARS} more characters]"


def read_document(file: FileInfo) -> Row | BadLine:
    """A file that is one record; `path` is below the input folder. `text` is UTF-8 bytes without a
    mark, with replacement characters for what is none. InputError when it cannot be read."""
    if file.size > MOST_DOCUMENT_BYTES:
        return BadLine(f"{file.uri}: larger than {MOST_DOCUMENT_BYTES >> 30} GiB", file.key_path)
    with open_input(file.place) as opened:
        content = opened.read()
    text = content.removeprefix(codecs.BOM_UTF8)
    try:
        text_array(text).validate(full=True)
    except pa.ArrowInvalid:
        text = text.decode("utf-8", "replace").encode()
    digest = hashlib.sha256(file.key_path.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(text)
    return {"id": digest.hexdigest()[:32], "path": file.key_path, "uri": file.uri, "text": text}


def text_array(text: bytes) -> pa.StringArray:
    offsets = pa.array([0, len(text)], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(1, offsets, pa.py_buffer(text))


def _why(line: bytes, number: int, encoding: str, error: orjson.JSONDecodeError) -> str:
    """orjson does not say where a line is no UTF-8."""
    if len(line) > MOST_LINE_BYTES:
        return f"line {number}: longer than {MOST_LINE_BYTES >> 20} MiB; its beginning is kept"
    try:
        line.decode()
    except UnicodeDecodeError as found:
        column = len(line[: found.start].decode()) + 1
        wide = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        what = "UTF-16 by its first bytes, set `encoding`" if wide else f"not {encoding}"
        return f"line {number}, column {column}: {what}"
    return f"line {number}, column {error.colno}: {error.msg}"


def _bad(line: bytes, detail: str) -> BadLine:
    line = line if len(line) <= MOST_LINE_BYTES else line[:MOST_RAW_CHARS]
    return BadLine(detail, clip(line.rstrip(b"\r\n").decode("utf-8", "replace")))


def _format_by_magic(head: bytes) -> Format | None:
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)


def _refuse_packed(place: Place, packing: Format, lines: io.BufferedReader) -> None:
    inner = _format_by_magic(lines.peek(HEAD_BYTES)[:HEAD_BYTES])
    if inner is None:
        return
    how = _CODECS[packing]
    if inner.has_columns:
        why = f"a file of {inner} inside {how}, which can only be read from its beginning"
        raise InputError(f"{place}: {why}; decompress it: {inner} has compression of its own")
    raise InputError(f"{place}: compressed twice; decompress it once")


class _Blocks(io.RawIOBase):
    """What an iterator gives, as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._ready = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready and (block := next(self._blocks, None)) is not None:
            self._ready = memoryview(block)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _buffered(blocks: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Blocks(blocks), BLOCK_BYTES)


def _blocks_of(source: io.BufferedReader) -> Iterator[bytes]:
    return iter(partial(source.read1, BLOCK_BYTES), b"")


def _heard(stored: io.BufferedReader, content: Digest) -> Iterator[bytes]:
    for block in _blocks_of(stored):
        content.update(block)
        yield block


def _unpacked(place: Place, unpacker: Any, codec: str) -> Iterator[bytes]:
    """What a compressed file holds: all members of gzip, with zeros behind them, which tapes and
    blocks of a fixed size have; all frames of zstd."""
    lines = 0
    try:
        while data := unpacker.read1(STEP_BYTES):
            lines += data.count(b"\n")
            yield data
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None:  # the store's, not the codec's
            raise
        raise InputError(
            f"{place}: damaged or cut off after line {lines:,}, as {codec} says: {error}; "
            "write it again or leave it out"
        ) from error


def _transcoded(place: Place, source: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    """In UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)(_MARKED)
    try:
        for block in _blocks_of(source):
            yield decoder.decode(block).encode("utf-8", _MARKED)
        yield decoder.decode(b"", final=True).encode("utf-8", _MARKED)
    except UnicodeError as error:  # a codec that knows no marks
        what = f"cannot be read as {encoding}: {error}; name its encoding"
        raise InputError(f"{place}: {what}") from error


_MARKED = "modelcall.marked"
"""Name of an error handler: bytes that an encoding does not have are written as `\\xff`, and their
value after it. The byte 0xff is in no UTF-8, so that their line cannot pass for a good one."""


def _marked(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeDecodeError):
        values = (f"\\x{byte:02x}" for byte in error.object[error.start : error.end])
        return f"\udfff{''.join(values)}", error.end
    if isinstance(error, UnicodeEncodeError):
        return b"\xff" * (error.end - error.start), error.end
    raise error


codecs.register_error(_MARKED, _marked)
