"""Requests by the file: OpenAI's files and batches, through its own client."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO, Literal, TypeVar, cast

import openai
import orjson
from openai.types import Batch, FileObject

from modelcall_assets.errors import EndpointDown, EndpointRefused
from modelcall_assets.llm.body import Unreadable
from modelcall_assets.llm.classify import (
    PATIENCE,
    QUOTA_CODES,
    Patience,
    Refused,
    Reply,
    TryAgain,
    Verdict,
    classify,
)
from modelcall_assets.llm.json_text import as_object, parsed
from modelcall_assets.llm.sdk_transport import FAILED, SdkTransport
from modelcall_assets.records.outcome import Failure, Reason

T = TypeVar("T")
M = TypeVar("M", bound=openai.BaseModel)

CHAT_URL = "/v1/chat/completions"
TRANSFER_TIMEOUT_S = 3600.0
FIRST_LOOK = 1 / 20
"""The first pause between two looks at a batch, as a part of the longest one."""
SLOWER_BY = 1.5
LISTED_AT_ONCE, MOST_PAGES = 100, 20
CLOCKS_DIFFER_S = 3600.0
_TOKEN = "modelcall"
_TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
_REFUSALS = QUOTA_CODES | {"model_not_found", "invalid_api_key"}
_FULL = "token_limit_exceeded"
_NOT_EXECUTED = {"request_timeout": Reason.TIMEOUT, "batch_expired": Reason.TIMEOUT}


@dataclass
class Ended:
    """A batch that has ended, and what its files said beside answers."""

    id: str
    status: str = "gone"
    files: tuple[str, ...] = ()
    """What it answered and what failed; those there are."""
    input: str = ""
    error: str = ""
    """Why it failed as a whole, else empty."""
    refused: bool = False
    """Whether no batch with this key, model and account can do better."""
    queue_full: bool = False
    """Whether it has to wait for other batches of the account."""
    lines: int = 0
    asked: set[str] = field(default_factory=set[str])
    """Ids of its requests; empty when nobody knows them any more."""
    answered: set[str] = field(default_factory=set[str])
    strangers: Counter[str] = field(default_factory=Counter[str])
    """Ids of lines that count for nothing, by how many."""
    counts: bool = True
    """Whether it was a try for the requests that it left without an answer."""
    _failures: dict[str, Failure] = field(default_factory=dict[str, Failure])
    _distinct: dict[Failure, Failure] = field(default_factory=dict[Failure, Failure])

    @property
    def is_gone(self) -> bool:
        """Whether the endpoint does not know it any more."""
        return self.status == "gone"

    @property
    def has_nothing(self) -> bool:
        """Whether it failed, or is gone, without having done anything."""
        return not self.lines and (self.is_gone or self.status == "failed")

    def is_strange(self, custom_id: str) -> bool:
        """Whether the batch was not asked for this, or has answered it already."""
        strange = custom_id in self.answered or bool(self.asked and custom_id not in self.asked)
        if strange:
            self.strangers[custom_id] += 1
        return strange

    def refuse(self, detail: str) -> None:
        """As one of its lines says."""
        self.refused, self.error = True, detail

    def fail(self, custom_id: str, failure: Failure) -> None:
        """Thousands of requests may have one failure."""
        self._failures[custom_id] = self._distinct.setdefault(failure, failure)

    def failure_of(self, custom_id: str) -> Failure:
        """Why a request of the batch has no answer."""
        if (known := self._failures.get(custom_id)) is not None:
            return known
        detail = f"batch {self.id} ({self.status}) has neither answer nor error for this request"
        if not self.error:
            return Failure(Reason.DROPPED, detail)
        reason = Reason.RATE_LIMITED if self.queue_full else Reason.SERVER_ERROR
        return Failure(reason, f"{detail}: {self.error}")


@dataclass
class BatchClient(SdkTransport):
    """Batches of one endpoint. Every call is repeated until it is answered, as far as patience
    goes; it raises EndpointRefused or EndpointDown otherwise, and what `pause` raises."""

    completion_window: str = "24h"
    most_requests: int = 50_000
    """In one file."""
    poll_s: float = 60.0
    """The longest time between two looks at a batch."""
    max_retries: int = 5
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    patience: Patience = PATIENCE
    _was_reached: bool = field(default=False, init=False)

    async def submit(self, lines: IO[bytes], token: str, since: float) -> str:
        """The id of the new batch. When the answer to its creation got lost, its token finds it."""
        tried = False

        async def upload() -> str:
            lines.seek(0)
            file = await self._client.files.create(
                file=("batch.jsonl", lines), purpose="batch", extra_headers=self._headers
            )
            return self._checked(file, FileObject, "id").id

        async def create() -> str:
            nonlocal tried
            if tried and (known := await self.find(token, since)) is not None:
                return known
            tried = True
            batch = await self._client.batches.create(
                completion_window=cast("Literal['24h']", self.completion_window),
                endpoint=CHAT_URL,
                input_file_id=file_id,
                metadata={_TOKEN: token},
                extra_headers=self._headers,
            )
            return self._checked(batch, Batch, "id").id

        file_id = await self._done(upload, TRANSFER_TIMEOUT_S)
        return await self._done(create)

    async def find(self, token: str, since: float) -> str | None:
        """The id of the batch that was submitted with this token after `since` (Unix time)."""

        async def look() -> str | None:
            after: str | openai.Omit = openai.omit
            for _ in range(MOST_PAGES):
                page = await self._client.batches.list(
                    after=after, limit=LISTED_AT_ONCE, extra_headers=self._headers
                )
                if isinstance(cast("object", page), str):
                    raise Unreadable(Reason.BAD_REPLY, "the reply is no list")
                for listed in page.data:  # the newest first
                    batch = self._checked(listed, Batch, "id", "created_at")
                    if (batch.metadata or {}).get(_TOKEN) == token:
                        return batch.id
                    after = batch.id
                    if batch.created_at < since - CLOCKS_DIFFER_S:
                        return None
                if not page.has_next_page():
                    return None
            return None

        return await self._done_if_there(look)

    async def until_ended(self, batch_id: str) -> Ended:
        wait = self.poll_s * FIRST_LOOK
        while (batch := await self._looked_at(batch_id)) is not None:
            if batch.status in _TERMINAL:
                return _ended(batch_id, batch)
            await self.pause(wait)
            wait = min(self.poll_s, wait * SLOWER_BY)
        return Ended(batch_id)

    async def goes_on(self, batch_id: str) -> str | None:
        """The status of a batch that has not ended."""
        batch = await self._looked_at(batch_id)
        return None if batch is None or batch.status in _TERMINAL else batch.status

    async def custom_ids(self, file_id: str) -> set[str]:
        """What the file of a batch asks; nothing when the endpoint does not have it any more."""
        with TemporaryFile() as file:
            await self.download(file_id, file)
            lines = (as_object(parsed(line)) for line in file)
            return {str(line["custom_id"]) for line in lines if "custom_id" in line}

    async def download(self, file_id: str, to: IO[bytes]) -> None:
        """Nothing when the endpoint has no such file any more."""

        async def content() -> None:
            to.seek(0)
            to.truncate()
            async with self._client.files.with_streaming_response.content(
                file_id, extra_headers=self._headers
            ) as response:
                async for part in response.iter_bytes():
                    to.write(part)

        await self._done_if_there(content, TRANSFER_TIMEOUT_S)
        to.seek(0)

    async def delete(self, file_ids: Iterable[str]) -> None:
        """Tries once each: files that stay do no harm."""
        for file_id in file_ids:
            try:
                async with asyncio.timeout(self.timeout_s):
                    await self._client.files.delete(file_id, extra_headers=self._headers)
            except FAILED:
                continue

    @staticmethod
    def line(custom_id: str, payload: bytes) -> bytes:
        head = {"custom_id": custom_id, "method": "POST", "url": CHAT_URL}
        return b"".join((orjson.dumps(head)[:-1], b',"body":', payload, b"}\n"))

    def results(self, file: Iterable[bytes]) -> Iterator[tuple[str, Reply]]:
        """`custom_id` and reply by the lines of an output or error file; what is no result is
        passed over. A fault in the reply says that there was none."""
        for line in file:
            try:
                told = orjson.loads(line)
                custom_id, response = str(told["custom_id"]), told.get("response")
                if response is None:
                    error: dict[str, str] = told.get("error") or {}
                    code = error.get("code") or "no response"
                    text = f"{code}: {error.get('message') or 'no reason given'}"
                    fault = _NOT_EXECUTED.get(code, Reason.DROPPED)
                    yield custom_id, self.cleaned(Reply(0, {}, text.encode(), fault))
                    continue
                status, body = int(response["status_code"]), orjson.dumps(response["body"])
            except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError):
                continue
            yield custom_id, self.cleaned(Reply(status, {}, body))

    @property
    def _headers(self) -> dict[str, str | openai.Omit]:
        """The content type is the call's own."""
        return {k: v for k, v in self._sent.items() if k.lower() != "content-type"}

    async def _looked_at(self, batch_id: str) -> Batch | None:
        async def look() -> Batch:
            batch = await self._client.batches.retrieve(batch_id, extra_headers=self._headers)
            return self._checked(batch, Batch, "status", "input_file_id")

        return await self._done_if_there(look)

    async def _done(self, call: Callable[[], Awaitable[str]], least_s: float = 0.0) -> str:
        result = await self._done_if_there(call, least_s, absent=())
        assert result is not None
        return result

    async def _done_if_there(
        self,
        call: Callable[[], Awaitable[T]],
        least_s: float = 0.0,
        absent: Collection[int] = (404, 405),
    ) -> T | None:
        """What the call gives, in `least_s` seconds or more; None when its object is absent."""
        loop = asyncio.get_running_loop()
        attempts, patient_until = 0, loop.time() + self.patience.busy_s
        while True:
            try:
                async with asyncio.timeout(max(self.timeout_s, least_s)):
                    result = await call()
                self._was_reached = True
                return result
            except FAILED as error:
                reply = self.cleaned(self.failed(error))
            verdict = classify(reply)
            if not isinstance(verdict, TryAgain):
                if reply.status in absent:
                    return None
                raise self._refused(reply.status, verdict)
            attempts += 1
            is_patient = self._was_reached and loop.time() < patient_until
            if attempts > self.max_retries and not is_patient:
                failure = verdict.failure
                raise EndpointDown(
                    f"{self.name}: no answer to a call about batches: {failure.reason}: "
                    f"{failure.detail}. Mend that and run the task again: what was answered is kept"
                )
            await self.pause(self.patience.backoff(attempts, verdict.after_s))

    def _checked(self, reply: object, kind: type[M], *needed: str) -> M:
        """The SDK takes any reply, and leaves out what is not there."""
        if not isinstance(reply, kind) or not reply.model_fields_set.issuperset(needed):
            raise Unreadable(Reason.BAD_REPLY, f"the reply is no {kind.__name__.lower()}")
        told = reply.model_dump_json()
        cleaned = self.without_secrets(told)
        return reply if cleaned is told else kind.construct(**orjson.loads(cleaned))

    def _refused(self, status: int, verdict: Verdict) -> EndpointRefused:
        why = verdict.detail if isinstance(verdict, Refused | Failure) else f"HTTP {status}"
        return EndpointRefused(
            f"{self.name} refuses batches: {why}. Check api_key, model and base_url in the model "
            "file, the account's quota, and whether the endpoint has OpenAI's batches at all"
        )


def _ended(batch_id: str, batch: Batch) -> Ended:
    errors = (batch.errors.data if batch.errors else None) or []
    codes = {error.code for error in errors if error.code}
    told = [f"{error.code or 'error'}: {error.message}" for error in errors]
    more = f"; and {len(told) - 1} more" if len(told) > 1 else ""
    return Ended(
        batch_id,
        status=batch.status,
        files=tuple(each for each in (batch.output_file_id, batch.error_file_id) if each),
        input=batch.input_file_id,
        error=told[0] + more if told else "",
        refused=not codes.isdisjoint(_REFUSALS),
        queue_full=_FULL in codes,
    )
