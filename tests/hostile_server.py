# ruff: noqa: E501
"""A server that does what servers should not: every behaviour is a name, the steps it takes for
one request, and what may become of the row that asked. Each row's own answer carries its name."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from itertools import repeat

from endpoint import CLOSE, HALF_CLOSE, HANG, RESET, Endpoint, Request, Step, completion, serving

OWN = "own"
DROPPED, BAD_REPLY, TIMEOUT = {"dropped"}, {"bad_reply"}, {"timeout"}


def answer_to(row: str) -> bytes:
    return json.dumps({**completion(content=row), "id": f"id-{row}"}).encode()


def head(*lines: str, status: str = "200 OK", version: str = "HTTP/1.1") -> bytes:
    return "\r\n".join([f"{version} {status}", *lines, "", ""]).encode("latin-1")


def whole(body: bytes, *lines: str, status: str = "200 OK", version: str = "HTTP/1.1") -> bytes:
    return head(f"Content-Length: {len(body)}", *lines, status=status, version=version) + body


def chunked(
    body: bytes, size: int = 1 << 20, extension: bytes = b"", trailers: bytes = b""
) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    framed = [b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts]
    return head("Transfer-Encoding: chunked") + b"".join(framed) + b"0\r\n" + trailers + b"\r\n"


def encoded(body: bytes, *encodings: str, status: str = "200 OK") -> bytes:
    return whole(body, *(f"Content-Encoding: {each}" for each in encodings), status=status)


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def stream(row: str) -> bytes:
    chunk = json.loads(answer_to(row))
    chunk["choices"][0]["delta"] = chunk["choices"][0].pop("message")
    body = b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
    return whole(body, "Content-Type: text/event-stream")


EVENTS = head("Content-Type: text/event-stream")
NOBODY = answer_to("nobody")
ZEROS = gzip.compress(bytes(64 << 20))
"""64 MiB in 64 KiB."""
RAW_ZEROS = raw_deflate(bytes(64 << 20))
ZEROS_TWICE = gzip.compress(ZEROS)


def of_body(make: Callable[[bytes], bytes], *then: Step) -> Behaviour:
    """What only depends on the row's own answer."""
    return lambda row: [make(answer_to(row)), *then]


def endless(start: bytes, piece: bytes) -> Behaviour:
    def steps(_: str) -> Iterator[Step]:
        yield start
        yield from repeat(piece)

    return steps


def in_bytes(data: bytes, pause: float = 0.0) -> Iterator[Step]:
    for position in range(len(data)):
        yield data[position : position + 1]
        yield pause


Behaviour = Callable[[str], Iterable[Step]]
KIB = b"x" * 1024

BEHAVIOURS: dict[str, tuple[Behaviour, set[str]]] = {
    # As it should be, in pieces of any size
    "honest": (of_body(whole), {OWN}),
    "byte by byte": (lambda row: in_bytes(whole(answer_to(row))), {OWN}),
    "a pause in the body": (of_body(lambda b: whole(b)[:-9], 0.02, b'e": 1}'), BAD_REPLY | TIMEOUT),
    "a pause in the head": (lambda row: [whole(answer_to(row))[:9], 0.02, whole(answer_to(row))[9:]], {OWN}),
    "chunked": (of_body(chunked), {OWN}),
    "chunks of a byte": (of_body(lambda b: chunked(b, 1)), {OWN}),
    "chunked, byte by byte": (lambda row: in_bytes(chunked(answer_to(row), 7)), {OWN}),
    "chunk extensions": (of_body(lambda b: chunked(b, 9, b";a=b")), {OWN}),
    "a stream": (lambda row: [stream(row)], {OWN}),
    "no reason phrase": (of_body(lambda b: whole(b, status="200")), {OWN}),
    "no reason and no space": (of_body(lambda b: whole(b, status="200").replace(b"200 ", b"200")), {OWN}),
    "HTTP/1.0": (of_body(lambda b: whole(b, version="HTTP/1.0"), CLOSE), {OWN}),
    "HTTP/1.0 without a length": (of_body(lambda b: head(version="HTTP/1.0") + b, CLOSE), {OWN}),
    "as long as the connection": (of_body(lambda b: head() + b, CLOSE), {OWN}),
    "connection: close, and stays": (of_body(lambda b: whole(b, "Connection: close")), {OWN}),
    "connection: close, and closes": (of_body(lambda b: whole(b, "Connection: close"), CLOSE), {OWN}),
    "keep-alive, and closes": (of_body(lambda b: whole(b, "Connection: keep-alive"), CLOSE), {OWN}),
    "half closes behind the reply": (of_body(whole, HALF_CLOSE, HANG), {OWN}),
    "an upgrade nobody takes": (of_body(lambda b: whole(b, "Upgrade: h2c", "Connection: upgrade")), {OWN}),
    "notices before it": (of_body(lambda b: head(status="100 Continue") + head("Link: x", status="103 Early Hints") + whole(b)), {OWN}),
    "no letters in a header": (of_body(lambda b: whole(b, "X-Name: \xe9\xff")), {OWN}),
    # Framing that is none
    "nothing": (lambda _: [CLOSE], DROPPED),
    "reset": (lambda _: [RESET], DROPPED),
    "reset in the body": (of_body(lambda b: whole(b)[:-5], RESET), DROPPED),
    "closed in the body": (of_body(lambda b: whole(b)[:-5], CLOSE), DROPPED),
    "closed in the head": (lambda _: [b"HTTP/1.1 200 OK\r\nContent-Le", CLOSE], DROPPED),
    "half closed in the body": (of_body(lambda b: whole(b)[:-5], HALF_CLOSE, HANG), DROPPED),
    "closed between chunks": (of_body(lambda b: chunked(b, 9)[:-5], CLOSE), DROPPED),
    "cut where the connection is the end": (of_body(lambda b: head() + b[:-5], CLOSE), BAD_REPLY),
    "no HTTP": (lambda _: [b"what is this\r\n\r\n", CLOSE], DROPPED),
    "HTTP/0.9": (of_body(lambda b: b, CLOSE), DROPPED),
    "another protocol": (of_body(lambda b: whole(b, version="ICY")), DROPPED),
    "TLS": (lambda _: [b"\x15\x03\x01\x00\x02\x02\x46", CLOSE], DROPPED),
    "junk before it": (of_body(lambda b: b"\0\1junk\r\n" + whole(b)), DROPPED),
    "empty lines before it": (of_body(lambda b: b"\r\n\r\n" + whole(b)), {OWN} | DROPPED),
    "lines that end in LF": (of_body(lambda b: head(f"Content-Length: {len(b)}").replace(b"\r", b"") + b), {OWN} | DROPPED),
    "length and chunks": (of_body(lambda b: chunked(b).replace(b"\r\n", b"\r\nContent-Length: 5\r\n", 1)), {OWN} | DROPPED),
    "chunks and length": (of_body(lambda b: chunked(b).replace(b"chunked\r\n", b"chunked\r\nContent-Length: 5\r\n", 1)), {OWN} | DROPPED),
    "the same length twice": (of_body(lambda b: whole(b, f"Content-Length: {len(b)}")), {OWN} | DROPPED),
    "two lengths": (of_body(lambda b: whole(b, "Content-Length: 3")), DROPPED),
    "a length below 0": (of_body(lambda b: head("Content-Length: -5") + b), DROPPED),
    "a length that is no number": (of_body(lambda b: head("Content-Length: 5, 5") + b), DROPPED),
    "a length of 30 digits": (of_body(lambda b: head(f"Content-Length: {'9' * 30}") + b), DROPPED),
    "a length that is too short": (of_body(lambda b: head(f"Content-Length: {len(b) - 5}") + b), BAD_REPLY | DROPPED),
    "a chunk that is no number": (of_body(lambda b: chunked(b).replace(b"\r\n0\r\n", b"\r\nzz\r\n")), DROPPED),
    "a chunk of 2^64": (of_body(lambda b: head("Transfer-Encoding: chunked") + b"f" * 17 + b"\r\n" + b), DROPPED),
    "a chunk without its end": (of_body(lambda b: chunked(b).replace(b"}\r\n0", b"}0")), DROPPED),
    "a folded header": (of_body(lambda b: whole(b, "X-A: 1\r\n 2")), {OWN} | DROPPED),
    "a header without a colon": (of_body(lambda b: whole(b, "nothing")), DROPPED),
    "NUL in a header": (of_body(lambda b: whole(b, "X-A: \0")), {OWN} | DROPPED),
    "204 with a body": (of_body(lambda b: whole(b, status="204 No Content")), BAD_REPLY | DROPPED),
    "304 with a body": (of_body(lambda b: whole(b, status="304 Not Modified")), {"refused"} | DROPPED),
    "switched protocols": (lambda _: [head("Upgrade: h2c", "Connection: upgrade", status="101 X"), NOBODY], DROPPED),
    "status 999": (of_body(lambda b: whole(b, status="999 X")), {"server_error"} | DROPPED),
    "status 1000": (of_body(lambda b: whole(b, status="1000 X")), DROPPED),
    # More than was asked for: the answer is good, the connection is not
    "one byte more": (of_body(lambda b: whole(b) + b"H"), {OWN}),
    "one byte more than chunks": (of_body(lambda b: chunked(b) + b"H"), {OWN}),
    "a line more": (of_body(lambda b: whole(b) + b"\r\n"), {OWN}),
    "a reply more": (of_body(lambda b: whole(b) + whole(NOBODY)), {OWN}),
    "a head more": (of_body(lambda b: whole(b) + head("Content-Length: 200")), {OWN}),
    "an error more": (of_body(lambda b: whole(b) + whole(b"{}", status="500 X")), {OWN}),
    "a notice more": (of_body(lambda b: whole(b) + head(status="100 Continue")), {OWN}),
    "two and a half": (of_body(lambda b: whole(b) + (whole(b) + whole(b)[:50])), {OWN}),
    "twice": (of_body(lambda b: whole(b) * 2), {OWN}),
    "twice, one behind the other": (lambda row: [whole(answer_to(row)), whole(answer_to(row))], {OWN}),
    "twice, a moment between": (lambda row: [whole(answer_to(row)), 0.003, whole(answer_to(row))], {OWN}),
    "chunks twice": (lambda row: [chunked(answer_to(row)), chunked(answer_to(row))], {OWN}),
    "a stream twice": (lambda row: [stream(row), stream(row)], {OWN}),
    "a stream twice in one": (lambda row: [stream(row) * 2], {OWN}),
    "a byte, and later the rest": (of_body(lambda b: whole(b) + b"H", 0.003, whole(NOBODY)[1:]), {OWN}),
    "later to nobody, in bytes": (lambda row: [whole(answer_to(row)), 0.002, *in_bytes(whole(NOBODY))], {OWN}),
    "408 to nobody, then closed": (of_body(whole, 0.002, whole(b"{}", status="408 X"), CLOSE), {OWN}),
    "trailers": (of_body(lambda b: chunked(b, trailers=b"Retry-After: 300\r\nContent-Encoding: gzip\r\n")), {OWN}),
    "trailers about the framing": (of_body(lambda b: chunked(b, trailers=b"Content-Length: 3\r\nConnection: close\r\n")), {OWN} | DROPPED),
    # Encodings
    "gzip": (of_body(lambda b: encoded(gzip.compress(b), "gzip")), {OWN}),
    "GZIP": (of_body(lambda b: encoded(gzip.compress(b), " GZIP ")), {OWN}),
    "x-gzip": (of_body(lambda b: encoded(gzip.compress(b), "x-gzip")), {OWN}),
    "gzip byte by byte": (lambda row: in_bytes(encoded(gzip.compress(answer_to(row)), "gzip")), {OWN}),
    "gzip in two members": (of_body(lambda b: encoded(gzip.compress(b[:9]) + gzip.compress(b[9:]), "gzip")), {OWN}),
    "gzip in members, byte by byte": (lambda row: in_bytes(encoded(gzip.compress(b"") + gzip.compress(answer_to(row)), "gzip")), {OWN}),
    "gzip and zeros": (of_body(lambda b: encoded(gzip.compress(b) + bytes(9), "gzip")), {OWN}),
    "gzip and junk": (of_body(lambda b: encoded(gzip.compress(b) + b"junk", "gzip")), {OWN}),
    "deflate": (of_body(lambda b: encoded(zlib.compress(b), "deflate")), {OWN}),
    "raw deflate": (of_body(lambda b: encoded(raw_deflate(b), "Deflate")), {OWN}),
    "raw deflate byte by byte": (lambda row: in_bytes(encoded(raw_deflate(answer_to(row)), "deflate")), {OWN}),
    "identity": (of_body(lambda b: encoded(b, "identity")), {OWN}),
    "no name of an encoding": (of_body(lambda b: encoded(b, "")), {OWN}),
    "gzip of gzip": (of_body(lambda b: encoded(gzip.compress(gzip.compress(b)), "gzip, gzip")), {OWN}),
    "deflate, then gzip": (of_body(lambda b: encoded(gzip.compress(zlib.compress(b)), "deflate", "gzip")), {OWN}),
    "br": (of_body(lambda b: encoded(b, "br")), BAD_REPLY),
    "zstd below gzip": (of_body(lambda b: encoded(gzip.compress(b), "zstd, gzip")), BAD_REPLY),
    "gzip a hundred times": (of_body(lambda b: encoded(b, ", ".join(["gzip"] * 100))), BAD_REPLY),
    "gzip that is cut off": (of_body(lambda b: encoded(gzip.compress(b)[:-3], "gzip")), DROPPED),
    "gzip with a wrong sum": (of_body(lambda b: encoded(gzip.compress(b)[:-8] + bytes(8), "gzip")), DROPPED),
    "gzip that is none": (of_body(lambda b: encoded(b, "gzip")), DROPPED),
    "gzip of nothing": (lambda _: [encoded(b"", "gzip")], BAD_REPLY),
    "an error in br": (lambda _: [encoded(b"??", "br", status="503 X")], {"server_error"}),
    "an error in broken gzip": (lambda _: [encoded(b"??", "gzip", status="429 X")], {"rate_limited"}),
    # Without end
    "a bomb of gzip": (lambda _: [encoded(ZEROS, "gzip")], BAD_REPLY),
    "a bomb of deflate": (lambda _: [encoded(RAW_ZEROS, "deflate")], BAD_REPLY),
    "a bomb in a bomb": (lambda _: [encoded(ZEROS_TWICE, "gzip, gzip")], BAD_REPLY),
    "a bomb in a stream": (lambda _: [whole(ZEROS, "Content-Encoding: gzip", "Content-Type: text/event-stream")], BAD_REPLY),
    "a bomb in an error": (lambda _: [encoded(ZEROS, "gzip", status="500 X")], {"server_error"}),
    "a body without end": (endless(head(), KIB * 64), BAD_REPLY),
    "chunks without end": (endless(head("Transfer-Encoding: chunked"), b"1000\r\n" + KIB * 4 + b"\r\n"), BAD_REPLY),
    "more than it may": (endless(head("Content-Length: 9999999999"), KIB * 64), BAD_REPLY),
    "an error without end": (endless(head(status="500 X"), KIB * 64), {"server_error"}),
    "an event without end": (endless(EVENTS + b"data: ", KIB * 64), BAD_REPLY),
    "lines of an event without end": (endless(EVENTS, b"data: x\n" * 4096), BAD_REPLY),
    "comments without end": (endless(EVENTS, b": still thinking\n\n" * 4096), BAD_REPLY),
    "gzip members without end": (endless(head("Content-Encoding: gzip"), gzip.compress(b"") * 500), BAD_REPLY),
    "a header without end": (endless(b"HTTP/1.1 200 OK\r\nX: ", KIB * 8), DROPPED),
    "headers without end": (endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1024), DROPPED),
    "notices without end": (endless(b"", head(status="100 Continue") * 512), DROPPED | TIMEOUT),
    "empty lines without end": (endless(b"", b"\r\n" * 4096), DROPPED | TIMEOUT),
    "long headers": (of_body(lambda b: whole(b, *(f"X-{n}: {'y' * 1000}" for n in range(100)))), {OWN} | DROPPED),
    "a trailer without end": (endless(head("Transfer-Encoding: chunked") + b"0\r\nX: ", KIB * 8), DROPPED | BAD_REPLY | TIMEOUT),
    "trailers without end": (endless(head("Transfer-Encoding: chunked") + b"0\r\n", b"X: y\r\n" * 1024), DROPPED | BAD_REPLY | TIMEOUT),
    "an extension without end": (endless(head("Transfer-Encoding: chunked") + b"5;", KIB * 8), DROPPED | BAD_REPLY | TIMEOUT),
    "zeros before a chunk without end": (endless(head("Transfer-Encoding: chunked"), b"0" * 8192), DROPPED | TIMEOUT),
    # Too slow
    "no answer": (lambda _: [HANG], TIMEOUT),
    "no end": (of_body(lambda b: whole(b)[:-1], HANG), TIMEOUT),
    "a byte now and then": (lambda row: in_bytes(whole(answer_to(row)), 0.02), TIMEOUT),
    "a stream that goes on": (lambda row: [EVENTS + b"data: {}\n\n", HANG], TIMEOUT),
    "a stream that stays open": (lambda row: [EVENTS + stream(row).partition(b"\r\n\r\n")[2], HANG], {OWN} | TIMEOUT),
}  # fmt: skip
TO_NOBODY = (
    "twice, one behind the other",
    "twice, a moment between",
    "chunks twice",
    "a stream twice",
    "a byte, and later the rest",
    "later to nobody, in bytes",
    "408 to nobody, then closed",
)
"""What these send comes when no request waits for it."""


def hostile(behaviour: Behaviour) -> AbstractAsyncContextManager[Endpoint]:
    """For the rows whose name begins with `bad`; honest for the others."""
    honest, _ = BEHAVIOURS["honest"]

    def answer(request: Request) -> Iterable[Step]:
        row = request.question
        return (behaviour if row.startswith("bad") else honest)(row)

    return serving(answer, keeps=True)
