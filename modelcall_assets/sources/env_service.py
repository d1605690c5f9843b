"""The client of an environment service of AgentScope Tuner, which sources and graders share: what
it opens is released, by the next process if need be."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import orjson

from modelcall_assets.llm.classify import RETRIED_STATUS
from modelcall_assets.records.outcome import Failure, Reason, RowFailed, short
from modelcall_assets.records.secrets import Remover, in_url, without_users
from modelcall_assets.sources.data import cache_folder
from modelcall_assets.sources.instances import CrossOut, noted, of_the_dead

T = TypeVar("T")
Reply = dict[str, Any]
ATTEMPTS = 3
MOST_SILENT = 10
"""So many calls in a row that had no answer at all, and the service counts as gone."""
_NOT_DONE = frozenset({Reason.CONNECT, Reason.RATE_LIMITED})
_SILENT = _NOT_DONE | {Reason.SERVER_ERROR, Reason.TIMEOUT, Reason.DROPPED}
_PASSING = _SILENT | {Reason.BAD_REPLY}


class ServiceGone(RowFailed):
    """Call after call had no answer: there is no use in asking about the next row."""


@dataclass
class Service:
    """Where it is, and how it is asked. A repetition waits up to `retry_wait_s`, three tenths of it
    at least."""

    url: str
    timeout_s: float = 300.0
    retry_wait_s: float = 10.0
    _silent: int = field(default=0, init=False)
    _unsure: set[str] = field(default_factory=set[str], init=False)
    """Instances that the service may still be about, for a call that nobody waits for."""
    _looked_back: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """ValueError when an option cannot be."""
        parts = urlsplit(self.url if isinstance(self.url, str) else "")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError("url: expected http://host:port or https://host, without a query")
        for name, least in (("timeout_s", 0.001), ("retry_wait_s", 0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value < float("inf"):
                raise ValueError(f"{name}: expected seconds; have {value!r}")

    @property
    def shown(self) -> str:
        """The URL as everyone may see it."""
        return without_users(self.url.rstrip("/"))

    async def tasks(self, env_type: str, split: str) -> list[str]:
        """Their ids, in the order of the service. RowFailed when it does not tell them."""
        about = {"env_type": env_type, "params": {"split": split}}
        told = await self.ask("get_env_profile", about, _ids, ())
        await self._look_back()
        return told

    @asynccontextmanager
    async def instance(self, env_type: str, task_id: str) -> AsyncIterator[Instance]:
        """Released whatever happens; its note stays, for the next process, where that fails.
        RowFailed when there is none."""
        if self._silent >= MOST_SILENT:
            what = f"the service is gone, {self._silent} calls in a row had no answer; start it"
            raise ServiceGone(Reason.CONNECT, f"{self.shown}: {what}")
        await self._look_back()
        identity = uuid4().hex
        with noted(self._notes, identity) as cross_out:
            try:
                about = {"env_type": env_type, "task_id": task_id, "instance_id": identity}
                yield Instance(self, identity, await self.ask("create", about, _state))
            finally:
                with suppress(RowFailed):
                    await self.ask("release", {"instance_id": identity}, _success)
                    if identity not in self._unsure:
                        cross_out()

    @property
    def _notes(self) -> Path:
        name = hashlib.sha256(self.shown.encode()).hexdigest()[:16]
        return cache_folder() / "environments" / name

    async def _look_back(self) -> None:
        """Once, at what processes have left open that are dead."""
        if not self._looked_back:
            self._looked_back = True
            with of_the_dead(self._notes) as left:
                await asyncio.gather(*starmap(self._release_left, left.items()))

    async def _release_left(self, instance: str, cross_out: CrossOut) -> None:
        with suppress(RowFailed):
            await self.ask("release", {"instance_id": instance}, _success, ())
            cross_out()

    async def ask(
        self,
        endpoint: str,
        fields: Mapping[str, Any],
        read: Callable[[Reply], T],
        repeated: Collection[Reason] = _PASSING,
    ) -> T:
        """What `read` finds in the reply; its ValueError says what is wrong there. What fails for a
        reason that is `repeated` is asked three times; RowFailed says what was tried."""
        attempt, waited_s = 1, 0.0
        while True:
            try:
                found = read(await self._sent(endpoint, {**_EMPTY, **fields}))
            except RowFailed as error:
                failed = error.failure
            except ValueError as error:
                failed = Failure(Reason.BAD_REPLY, f"the reply has {error}")
            else:
                self._silent = 0
                return found
            if failed.reason not in repeated or attempt == ATTEMPTS:
                break
            wait_s = random.uniform(0.3, 1) * self.retry_wait_s
            await asyncio.sleep(wait_s)
            attempt, waited_s = attempt + 1, waited_s + wait_s
        self._silent = self._silent + 1 if failed.reason in _SILENT else 0
        tried = f"; {attempt} attempts, {waited_s:.1f} s waited between them" * (attempt > 1)
        told = Remover(in_url(self.url)).text(f"{endpoint}: {failed.detail}{tried}")
        raise RowFailed(failed.reason, f"{self.shown}/{told}")

    async def _sent(self, endpoint: str, fields: Reply) -> Reply:
        """No connection is kept: what a service has closed meanwhile looks like a dropped call."""
        import aiohttp

        url, headers = f"{self.url.rstrip('/')}/{endpoint}", {"Content-Type": "application/json"}
        timeout, data = aiohttp.ClientTimeout(total=self.timeout_s), orjson.dumps(fields)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(url, data=data, headers=headers, allow_redirects=False) as reply,
            ):
                said = await reply.read()
        except aiohttp.ClientConnectorError as error:
            what = f"no connection: {error.os_error}; start the service, or correct the URL"
            raise RowFailed(Reason.CONNECT, what) from None
        except (aiohttp.ClientError, OSError) as error:
            self._unsure.add(fields["instance_id"])
            if isinstance(error, TimeoutError):
                what = f"no answer within {self.timeout_s:g} s"
                raise RowFailed(Reason.TIMEOUT, what) from None
            raise RowFailed(Reason.DROPPED, f"{type(error).__name__}: {error}") from None
        if not 200 <= reply.status < 300:
            is_passing = reply.status in RETRIED_STATUS or reply.status >= 500
            reason = Reason.SERVER_ERROR if is_passing else Reason.BAD_REQUEST
            if reply.status == 429:
                reason = Reason.RATE_LIMITED
            raise RowFailed(reason, f"HTTP {reply.status}: {_told(said)}")
        try:
            return {**orjson.loads(said)}
        except (ValueError, TypeError):
            what = f"the reply is no JSON object: {_told(said)}"
            raise RowFailed(Reason.BAD_REPLY, what) from None


@dataclass(frozen=True)
class Instance:
    """A task that was begun, and its first state."""

    service: Service
    identity: str
    state: Any

    @property
    def messages(self) -> list[dict[str, str]]:
        """Of the state, of one or several. ValueError when it has none, or one that is none."""
        turns = self.state if isinstance(self.state, list) else [self.state]
        for turn in turns or [None]:
            texts = [isinstance(turn, dict) and turn.get(name) for name in ("role", "content")]
            if not all(isinstance(text, str) for text in texts):
                what = "expected messages with role and content as text"
                raise ValueError(f"its first state: {what}; have {turn!r:.100}")
        return [*turns]

    async def step(self, action: dict[str, str]) -> None:
        """Not sent again where it may have been done: a second one is another conversation."""
        sent = {"instance_id": self.identity, "messages": action}
        await self.service.ask("step", sent, _object, _NOT_DONE)

    async def evaluate(self) -> float:
        sent = {"instance_id": self.identity, "params": {"sparse": False}}
        return await self.service.ask("evaluate", sent, _reward)


def run(work: Coroutine[Any, Any, T]) -> T:
    """In a thread of its own: that of the caller may have a loop. Who is interrupted waits until
    what was opened is released."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


_EMPTY = {"env_type": "default", "task_id": None, "instance_id": None, "messages": {}, "params": {}}


def _told(said: bytes) -> str:
    """The text, or the end of what stands as `detail`: a traceback, for one."""
    text = said.decode(errors="replace")
    with suppress(ValueError, TypeError, LookupError):
        text = str(orjson.loads(said)["detail"]).strip().rpartition("\n")[2]
    return short(" ".join(text.split())) or "nothing"


def _ids(reply: Reply) -> list[str]:
    listed = _of("list of ids", reply.get("data", reply.get("task_ids", [])), list)
    return [str(_of("id", each, str, int)) for each in listed]


def _object(reply: Reply) -> Reply:
    return _of("object as data", reply.get("data"), dict)


def _state(reply: Reply) -> Any:
    return _of("state", _object(reply).get("state"), list, dict)


def _reward(reply: Reply) -> float:
    return float(_of("number as data", reply.get("data"), int, float))


def _success(reply: Reply) -> bool:
    return _of("success", reply.get("success"), bool)


def _of(what: str, value: object, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"no {what}; have {value!r:.100}")
    return value
