"""The body of a reply as it comes: decompressed in small steps, and never more than a limit."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from modelcall_assets.records.outcome import Reason

ACCEPTED_ENCODINGS = "gzip, deflate"
_MOST_ENCODINGS = 3
"""Each takes a window of its own in memory."""
_MOST_MEMBERS = 4096
_STEP = 1 << 20
_GZIP, _ZLIB, _RAW_DEFLATE = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
_GZIP_MAGIC = b"\x1f\x8b"


class Unreadable(Exception):
    """What came cannot be taken for a body; `reason` is what that makes of the reply."""

    def __init__(self, reason: Reason, text: str) -> None:
        self.reason = reason
        super().__init__(text)


class Body:
    """Decodes what a Content-Encoding says. Raises Unreadable for another encoding than those we
    ask for, and from then on for what is broken or decoded is more than `most` bytes."""

    def __init__(self, encodings: str, most: float) -> None:
        names = [name for each in encodings.split(",") if (name := each.strip().lower())]
        names = [name for name in names if name != "identity"]
        if len(names) > _MOST_ENCODINGS or not {"gzip", "x-gzip", "deflate"}.issuperset(names):
            raise Unreadable(
                Reason.BAD_REPLY,
                f"the reply is encoded as {encodings!r}; asked for was {ACCEPTED_ENCODINGS}",
            )
        self._inflaters = [_Inflater(name) for name in reversed(names)]
        self._most = self._left = most

    def feed(self, data: bytes) -> Iterator[bytes]:
        pieces: Iterable[bytes] = (data,)
        for inflater in self._inflaters:
            pieces = inflater.of(pieces)
        for piece in pieces:
            self._left -= len(piece)
            if self._left < 0:
                raise too_large(self._most)
            yield piece

    @property
    def is_whole(self) -> bool:
        """Whether what was fed ends where the encodings say, or is nothing at all."""
        return all(inflater.is_whole for inflater in self._inflaters)


def too_large(most: float) -> Unreadable:
    """The failure that names the limit."""
    size = f"{most / (1 << 20):g} MiB"
    return Unreadable(Reason.BAD_REPLY, f"the reply is larger than {size} (max_reply_mib)")


class _Inflater:
    """One layer of gzip, or of deflate with or without zlib's frame, as the first bytes show.
    Gzip may have several members; what is behind the last one is padding."""

    def __init__(self, name: str) -> None:
        self._other = _RAW_DEFLATE if name == "deflate" else _GZIP
        self._start = b""
        self._inner = None
        self._is_gzip = False
        self._members = 0
        self._is_padding = False

    @property
    def is_whole(self) -> bool:
        """Also when nothing came at all."""
        return self._inner is None and (self._members > 0 or not self._start)

    def of(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            try:
                yield from self._inflate(piece)
            except zlib.error as error:
                text = f"the compressed body is broken: {error}"
                raise Unreadable(Reason.DROPPED, text) from error

    def _inflate(self, data: bytes) -> Iterator[bytes]:
        while not self._is_padding:
            if self._inner is None:
                data = self._start + data
                if len(data) < len(_GZIP_MAGIC):
                    self._start = data
                    return
                self._begin(data)
                continue
            piece = self._inner.decompress(data, _STEP)
            if piece:
                yield piece
            data = self._inner.unconsumed_tail
            if self._inner.eof:
                data, self._inner = self._inner.unused_data, None
                self._members += 1
                if self._members > _MOST_MEMBERS:
                    raise Unreadable(Reason.BAD_REPLY, f"more than {_MOST_MEMBERS} gzip members")
            elif not data and len(piece) < _STEP:
                return

    def _begin(self, data: bytes) -> None:
        self._start = b""
        is_gzip = data.startswith(_GZIP_MAGIC)
        if self._members:
            self._is_padding = not (self._is_gzip and is_gzip)
        self._is_gzip = is_gzip
        is_zlib = data[0] & 15 == zlib.DEFLATED and int.from_bytes(data[:2]) % 31 == 0
        window = _GZIP if is_gzip else _ZLIB if is_zlib else self._other
        self._inner = None if self._is_padding else zlib.decompressobj(window)
