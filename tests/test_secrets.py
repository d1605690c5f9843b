"""What is a secret is known everywhere, and nothing that a server echoes of it is kept or shown."""

from __future__ import annotations

import asyncio
import html
import itertools
import json
import re
import sqlite3
import traceback
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from endpoint import TRANSPORTS, Request, completion, delta, events, http, in_thread, said, serving
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st
from project import TASK, Project, merged, some_rows

from modelcall_assets.config.model import parse_model
from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.llm.classify import Reply, classify
from modelcall_assets.llm.completion import Texts, first_choice
from modelcall_assets.llm.json_text import parsed
from modelcall_assets.llm.transport import DirectTransport
from modelcall_assets.records import StoreOptions
from modelcall_assets.records.secrets import Remover, is_secret_header, looks_secret, names_secret
from modelcall_assets.storage.listing import exists, stat_file
from modelcall_assets.storage.places import Stores

KEY = 'sk-Ab9/c+d"e_0123456789'
PASSWORD = "pa55/wörd&more"
HEADER = "tok-of-the-team-42"
PROXY = "proxy-pa55word"


def forms(secret: str) -> Iterator[str]:
    """How a server may write it."""
    yield from (secret, quote(secret, safe=""), quote_plus(secret), html.escape(secret))
    yield re.sub("%..", lambda found: found[0].lower(), quote(secret, safe=""))
    yield quote(quote(secret, safe=""), safe="")
    for text in (secret, f"me:{secret}", f":{secret}", f"{secret}:"):
        yield from (b64encode(text.encode()).decode(), urlsafe_b64encode(text.encode()).decode())
    escaped = json.dumps(secret)[1:-1]
    yield from (escaped, escaped.replace("/", "\\/"), json.dumps(escaped)[1:-1])
    if secret.isascii():
        yield "".join(f"\\u{ord(each):04X}" for each in secret)
        yield secret.replace("-", "\\u002d")
        yield "".join(f"&#{ord(each)};" for each in secret)


def nested(text: str) -> list[str]:
    """The text as it is once it was read, and as JSON writes it once and twice."""
    return [text, once := json.dumps(text)[1:-1], json.dumps(once)[1:-1]]


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=40)
@given(
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=6, max_size=20),
    WORDS,
)
@example("a/b+c=", "\\")
def test_no_form_of_a_secret_is_left(secret: str, around: str) -> None:
    remove = Remover([secret])
    for form in forms(secret):
        for written in nested(form):
            assert written not in remove.text(f"{around}{written}{around}")


@settings(max_examples=40)
@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8, max_size=20), WORDS)
def test_an_answer_with_a_secret_stays_json(secret: str, around: str) -> None:
    for form in forms(secret):
        body = json.dumps({"content": f"{around}\n{form}\n{around}"}).encode()
        content = json.loads(Remover([secret])(body))["content"]
        assert "***" in content and form not in content


@given(WORDS)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    data = json.dumps({"content": text}).encode()
    assert Remover([KEY, PASSWORD])(data) is data


@pytest.mark.parametrize("text", ["x", "EMPTY", "none", "not-needed", "abc"])
def test_what_is_too_short_to_tell_apart_is_no_secret(text: str) -> None:
    assert Remover([text, ""])(b"EMPTY x none abc not-needed") == b"EMPTY x none abc not-needed"


@pytest.mark.parametrize(
    "text",
    [
        "hf_abcdefghijklmnopqrstuvwxyz",
        "sk-proj-abcdef0123456789",
        "ghp_0123456789abcdefghij",
        "github_pat_11ABCDEFG0123456789",
        "glpat-abcdefghij0123456789",
        "xoxb-123456789012-abcdef",
        "AKIAIOSFODNN7EXAMPLE",
        "AKLTabcdefghijklmnop",
        "AIzaSyA0123456789abcdefghij",
        "gsk_0123456789abcdefghij",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
        "Bearer abcdefgh12",
        "Basic bWU6cGFzc3dvcmQ=",
        "http://me:pass@host/v1",
        "https://host/v1?api_key=abc",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_known_shapes_of_keys(text: str) -> None:
    assert looks_secret(text)


@pytest.mark.parametrize(
    "text", ["", "max", "http://host:8000/v1?api-version=2", "Bearer ${KEY}", "http://${U}:${P}@h/v1",
             "s3://bucket/a@b", "deepseek-v3", "key_column", "hf_home", "Basic ${B}"],
)  # fmt: skip
def test_what_is_no_key(text: str) -> None:
    assert not looks_secret(text)


def test_names_that_tell_of_secrets_are_known() -> None:
    secret = ("api_key", "apiKey", "X-API-Key", "secret", "password", "hf_token", "Authorization")
    assert all(map(names_secret, (*secret, "session_token", "cookie", "client_secret")))
    plain = ("author", "authority", "max_tokens", "input_key", "eos_token", "tokens_per_minute")
    assert not any(map(names_secret, plain))
    assert all(names_secret(name, of_anyone=True) for name in ("key", "X-Key", "X-Token-Id"))
    assert not names_secret("X-Tokenizer", of_anyone=True)


# Servers that echo


def proxy_of(url: str) -> str:
    """The same server, as a proxy that is asked with a password."""
    return f"http://me:{PROXY}@{url.removeprefix('http://').partition('/')[0]}"


def echoed(kind: type, answer: bytes) -> Reply:
    """What becomes of the answer to a request that holds all the secrets."""

    async def run() -> Reply:
        async with serving(answer) as server:
            url = server.url.replace("://", f"://me:{quote(PASSWORD, safe='')}@")
            headers = {"X-Team": HEADER}
            proxy = proxy_of(server.url) if kind is DirectTransport else None
            async with kind("n", url, KEY, 20, headers, proxy, None, (HEADER, PROXY)) as transport:
                reply = await transport.send(b'{"model":"m","messages":[]}')
                assert b"authorization: basic " in server.asked[0].head.lower()
                return reply

    return asyncio.run(run())


def split_in_three(text: str) -> list[dict[str, Any]]:
    third = max(1, len(text) // 3)
    parts = (text[:third], text[third : 2 * third], text[2 * third :])
    return [*(delta(content=part) for part in parts), delta("stop")]


def answers(*secrets: str) -> dict[str, bytes]:
    """A reply of each kind with every form of the secrets."""
    echo = " ".join(form for secret in secrets for form in forms(secret))
    error = orjson.dumps({"error": {"message": echo}})
    return {
        "answer": said(content=echo),
        "stream": events(*split_in_three(echo)),
        "reasoning": events(*(delta(reasoning_content=each) for each in echo), delta("stop")),
        "error in a stream": events({"error": {"message": echo, "code": 500}}),
        "junk in a stream": events(echo),
        "page": http(200, f"<html>{echo}</html>".encode()),
        "no completion": http(200, orjson.dumps({"echo": echo})),
        "in UTF-16": http(200, " ".join(secrets).encode("utf-16")),
        "text": http(500, echo.encode()),
        "no HTTP": echo.encode(),
        **{str(status): http(status, error) for status in (400, 422, 429, 500, 503)},
    }


def refusals(*secrets: str) -> dict[str, bytes]:
    """Those that end a run."""
    places = {"Location": f"http://h/?a={quote(secrets[0], safe='')}", "X-Request-Id": secrets[-1]}
    body = answers(*secrets)["400"].partition(b"\r\n\r\n")[2]
    return {str(status): http(status, body, **places) for status in (302, 307, 401, 403, 404)}


ALL = (KEY, PASSWORD, HEADER, PROXY)


def told_in(text: str, secrets: Sequence[str] = ALL) -> list[str]:
    """The forms that are in a text, however often it was written as JSON."""
    written = (each for secret in secrets for form in forms(secret) for each in nested(form))
    return [each for each in written if each in text]


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("answer", [*answers(*ALL), *refusals(*ALL)])
def test_an_echo_is_never_handed_on(kind: type, answer: str) -> None:
    reply = echoed(kind, (answers(*ALL) | refusals(*ALL))[answer])
    text = reply.body.decode("utf-8", "replace").replace("\0", "")
    assert not told_in(text) and not told_in(str(dict(reply.headers)))
    with suppress(json.JSONDecodeError):
        assert not told_in(str(json.loads(reply.body)))


SIMPLE = {
    "an answer": (said(content="my topsecret text"), True),
    "an answer about errors": (said(content='my topsecret text: {"error": 1}'), True),
    "a refusal": (http(400, b"no: topsecret"), False),
    "an error beside half an answer": (
        http(200, b'{"choices":[{"message":{"content":"hal"}}],"error":"my topsecret text"}'),
        False,
    ),
    "an error by number": (
        http(200, b'{"choices":[],"base_resp":{"status_code":1004,"status_msg":"topsecret"}}'),
        False,
    ),
    "half a body": (http(200, b'{"choices":[{"message":{"content":"my topsecret text'), False),
}


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("said", SIMPLE)
def test_only_an_answer_keeps_words_that_are_a_simple_password_too(kind: type, said: str) -> None:
    answer, is_kept = SIMPLE[said]

    async def run() -> bytes:
        async with serving(answer) as server, kind("n", server.url, "topsecret") as one:
            return (await one.send(b"{}")).body

    assert (b"my topsecret text" in asyncio.run(run())) == is_kept


def in_parts(text: str) -> dict[str, list[Any]]:
    """Contents that are the text once they are put together."""
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    return {
        "answer": [{"type": "text", "text": each} for each in pieces],
        "thinking": [{"type": "thinking", "thinking": [{"text": each}]} for each in pieces],
        "refusal": [{"type": "refusal", "refusal": each} for each in pieces],
        "bare": list(pieces),
    }


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("place", in_parts(""))
def test_nor_what_is_an_echo_once_it_is_put_together(kind: type, place: str) -> None:
    for secret in (KEY, HEADER):
        echo = " ".join(forms(secret))
        choice = {"message": {"content": in_parts(f"é {echo} end")[place]}, "finish_reason": "stop"}
        body = echoed(kind, http(200, orjson.dumps({"choices": [choice], "id": "kept"}))).body
        found = first_choice(parsed(body))
        assert found is not None and b'"id":"kept"' in body
        texts = Texts.of(found["message"]["content"])
        [told] = filter(None, (texts.answer, texts.thinking, texts.refusal))
        assert told.startswith("é ***") and told.endswith(" end")
        assert not told_in(told, [secret])


def test_parts_without_a_secret_stay_as_they_are() -> None:
    body = orjson.dumps({"choices": [{"message": {"content": in_parts("some words")["answer"]}}]})
    assert echoed(DirectTransport, http(200, body)).body == body


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("type_", ["application/json", "text/plain"])
def test_nor_an_echo_in_events_of_another_content_type(kind: type, type_: str) -> None:
    for secret in ALL:
        chunks = map(orjson.dumps, split_in_three(secret))
        stream = b"".join(b"data: %b\n\n" % chunk for chunk in chunks)
        sent = echoed(kind, http(200, stream, Content_Type=type_))
        assert orjson.loads(sent.body)["choices"][0]["message"]["content"] == "***"


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_nor_a_part_of_one_that_was_cut(kind: type) -> None:
    for before in range(30, 62):
        places = {"Content_Encoding": "x" * before + KEY, "Location": "http://h/" + "y" * 400 + KEY}
        for status in (200, 302):
            reply = echoed(kind, http(status, b"{}", **places))
            said = classify(reply)
            assert KEY[:8] not in f"{reply.body!r} {said}", (before, status)


def test_a_neutral_header_of_the_environment_may_stand_in_an_answer() -> None:
    region = "eu-central-1-long-name"

    async def run() -> list[bytes]:
        bodies: list[bytes] = []
        for answer in (said(content=f"in {region}"), http(400, f"no {region}".encode())):
            async with (
                serving(answer) as server,
                DirectTransport("n", server.url, headers={"X-R": region}, private=(region,)) as one,
            ):
                bodies.append((await one.send(b"{}")).body)
        return bodies

    kept, told = asyncio.run(run())
    assert region.encode() in kept and told == b"no ***"


@pytest.mark.parametrize(
    ("name", "written", "value", "secret"),
    [
        ("X-Region", "${REGION}", "eu-central-1-long-name", False),
        ("X-Team", "${TEAM:-none}", "quality of code and text", False),
        ("X-Team", "${TEAM_TOKEN}", "quality of code", True),
        ("X-Api-Key", "${K}", "word", True),
        ("X-Team", "${TEAM}", "sk-abcdefgh", True),
        ("X-Team", "${TEAM}", "0123456789abcdef0123456789abcdef", True),
        ("X-Team", "${TEAM}", "123e4567-e89b-12d3-a456-426614174000", True),
    ],
)
def test_which_headers_of_the_environment_are_secret(
    name: str, written: str, value: str, secret: bool
) -> None:
    assert is_secret_header(name, written, value) is secret


# Whole runs


class Echo:
    """Answers requests in turn with an echo of each kind: live, and as a batch."""

    def __init__(self, answers: Mapping[str, bytes]) -> None:
        self.answers = itertools.cycle(answers.values())
        self.echo = answers["text"].partition(b"\r\n\r\n")[2].decode()
        self.uploaded = b""

    def __call__(self, request: Request) -> bytes:
        if request.path.endswith("/chat/completions"):
            return next(self.answers)
        if request.path.endswith("/files") and request.head.startswith(b"POST"):
            self.uploaded = request.body
            told: Any = {"id": "file-1", "object": "file", "filename": self.echo}
        elif "/content" in request.path:
            return http(200, b"\n".join(self.results()) + b"\n")
        else:
            told = {"id": "batch-1", "object": "batch", "status": "completed", "metadata": {},
                    "input_file_id": "file-1", "output_file_id": "file-2", "created_at": 0,
                    "errors": {"data": [{"code": "x", "message": self.echo}]}}  # fmt: skip
        return http(200, orjson.dumps(told), Content_Type="application/json")

    def results(self) -> Iterator[bytes]:
        bodies = [completion(content=self.echo), {"error": {"message": self.echo}}, self.echo]
        ids = re.findall(rb'"custom_id": ?"([^"]+)"', self.uploaded)
        for number, custom_id in enumerate(ids):
            response = {"status_code": (200, 400, 200)[number % 3], "body": bodies[number % 3]}
            error = {"code": self.echo, "message": self.echo}
            told = {"error": error} if number % 4 == 3 else {"response": response}
            yield orjson.dumps({"custom_id": custom_id.decode(), **told})
        yield orjson.dumps({"custom_id": CUT + self.echo, "response": None})


CUT = "x" * 90
"""Messages show a hundred characters of what others call their own."""


def texts_of(path: Path) -> Iterator[str]:
    """A file as it is, and what is in it once it is decompressed or opened."""
    data = path.read_bytes()
    yield data.decode("utf-8", "replace")
    if path.suffix == ".parquet":
        yield repr(pq.read_table(path).to_pylist()) + str(pq.read_schema(path).metadata)
    if path.suffix == ".zst":
        yield pa.CompressedInputStream(path.open("rb"), "zstd").read().decode("utf-8", "replace")
    if data.startswith(b"SQLite format 3"):
        with closing(sqlite3.connect(path)) as base:
            for (table,) in base.execute("select name from sqlite_master where type='table'"):
                yield repr(base.execute(f'select * from "{table}"').fetchall())


def files_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name != ".env")


def leaks_below(folder: Path, secrets: Sequence[str]) -> dict[str, list[str]]:
    files = files_below(folder)
    found = {path.name: told_in(" ".join(texts_of(path)), secrets) for path in files}
    return {name: told for name, told in found.items() if told}


MODELS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "direct": ((KEY, HEADER), {}),
    "sdk": ((KEY, HEADER), {"client_config": {"transport": "sdk"}}),
    "stream": ((KEY, HEADER), {"chat_config": {"stream": True}}),
    "batch": ((KEY, HEADER), {"mode": "batch", "batch": {"poll_seconds": 0.02}}),
    "proxy": (
        (KEY, HEADER, PROXY),
        {"client_config": {"base_url": "http://gone/v1", "proxy": "http://me:${PROXY}@HOST"}},
    ),
    "password": (
        (PASSWORD, HEADER),
        {"client_config": {"base_url": "http://me:${QUOTED}@HOST/v1", "api_key": "none"}},
    ),
}


@pytest.mark.parametrize("kind", [*MODELS, "refused"])
def test_no_file_holds_what_a_server_echoes(kind: str, bare: Project) -> None:
    secrets, changes = MODELS.get(kind, ((KEY, HEADER), {}))
    values = {"KEY": KEY, "QUOTED": quote(PASSWORD, safe=""), "TEAM_TOKEN": HEADER, "PROXY": PROXY}
    env = "".join(f"{name}='{value}'\n" for name, value in values.items())
    (bare.root / ".env").write_text(env)
    bare.write_task({"max_failure_rate": 1.0, "concurrency": {"max_concurrent_requests": 1}})
    given = answers(*secrets)
    bare.write_input("good.jsonl", some_rows(len(given)))
    echo = Echo(given | (refusals(*secrets) if kind == "refused" else {}))
    with in_thread(serving(echo)) as endpoint:
        host = urlsplit(endpoint.url).netloc
        client = {"base_url": "http://HOST/v1", "api_key": "${KEY}", "max_retries": 0,
                  "headers": {"X-Team": "${TEAM_TOKEN}"}}  # fmt: skip
        model = json.dumps(merged({"client_config": client}, changes)).replace("HOST", host)
        bare.write_model(json.loads(model))
        shown = [bare.run(command, TASK) for command in ("run-task", "try", "failures", "check")]
        assert endpoint.asked
    for ended in shown:
        assert not told_in(ended.told, secrets), ended
    assert leaks_below(bare.root, secrets) == {}
    texts = " ".join(itertools.chain.from_iterable(map(texts_of, files_below(bare.root))))
    assert f"{CUT}{secrets[0][:4]}" not in texts
    assert (f"{CUT}***" in texts) is (kind == "batch")


# Stores


class Telling(MemoryFileSystem):
    """Fails with all that it was given."""

    protocol = "telling"
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.told = options

    def info(self, path: str, **more: Any) -> Any:
        try:
            raise PermissionError(13, f"not with {ECHOED}")
        except PermissionError as error:
            raise OSError(f"{self.told} {ECHOED}") from error

    def exists(self, path: str, **more: Any) -> bool:
        raise RuntimeError(f"{self.told} {ECHOED}")


ECHOED = " ".join(form for secret in (KEY, HEADER) for form in forms(secret))


@pytest.mark.parametrize("ask", [stat_file, exists])
def test_what_a_store_tells_holds_no_keys(ask: Callable[[Any], object]) -> None:
    options = {"token": KEY, "more": {"where": f"https://me:{PROXY}@h/"}, "name": HEADER}
    options["fs.azure.account.key.me.net"] = "dotted-names-have-secrets-too"
    told = StoreOptions("t", "telling://", f"{__name__}:Telling", options, (HEADER,))
    with pytest.raises((InputError, StoreError)) as raised:
        ask(Stores([told]).place("telling://b/a.jsonl"))
    text = "".join(traceback.format_exception(raised.value))
    assert "telling://b/a.jsonl: cannot be read" in text
    assert not told_in(text, (KEY, HEADER, PROXY, "dotted-names-have-secrets-too"))


def test_a_key_in_a_file_that_a_header_or_an_option_should_not_have() -> None:
    leaked = "hf_abcdefghijklmnopqrst"
    for client in ({"headers": {"X-Any": leaked}}, {"base_url": f"http://h/v1?api_key={leaked}"}):
        _, problems = parse_model(
            {"client_config": {"base_url": "http://h/v1", **client}, "chat_config": {"model": "m"}},
            "m.yaml",
        )
        assert len(problems) == 1 and " in a file" in problems[0].wrong
        assert leaked not in str(problems[0])
