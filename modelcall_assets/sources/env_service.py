"""The client of an environment service of AgentScope Tuner, which sources and graders share: what
it opens is released, by the next process if need be."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from threading import Lock, Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import orjson

from modelcall_assets.llm.classify import RETRIED_STATUS, retry_after
from modelcall_assets.records.outcome import Reason, RowFailed, short
from modelcall_assets.records.secrets import Remover, in_url, without_users
from modelcall_assets.sources.data import cache_folder
from modelcall_assets.sources.instances import OpenInstances

T = TypeVar("T")
Reply = dict[str, Any]
ATTEMPTS = 3
MOST_SILENT = 10
"""So many calls in a row that had no answer at all, and the service counts as gone."""
GONE_S = 60.0
"""So long, and it is asked again."""
GRACE_S = 10.0
"""For what is still open when a client is closed; the next one releases what is left."""
_DNS_S = 600
"""Names are kept so long: when an interpreter ends it can look up none."""
_NOT_DONE = frozenset({Reason.CONNECT, Reason.RATE_LIMITED})
_SILENT = _NOT_DONE | {Reason.SERVER_ERROR, Reason.TIMEOUT, Reason.DROPPED}


class ServiceGone(RowFailed):
    """Call after call had no answer: there is no use in asking about the next row."""


@dataclass(frozen=True)
class Service:
    """Where it is, and how it is asked. A repetition waits up to `retry_wait_s`, three tenths of it
    at least, or as long as the service says, if that is not longer than `timeout_s`."""

    url: str
    timeout_s: float = 300.0
    retry_wait_s: float = 10.0

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

    def client(self) -> Client:
        """One for all of a process."""
        with _one_opens:
            if self not in open_clients:
                open_clients[self] = Client(self)
            return open_clients[self]


_one_opens, open_clients = Lock(), dict[Service, "Client"]()


class Client:
    """Its calls run in a thread of its own; any thread may `begin` some."""

    def __init__(self, service: Service) -> None:
        """Begins to release what processes have left that are dead."""
        self._service = service
        self._cleaned = Remover(in_url(service.url)).text
        self._silent, self._gone_until = 0, 0.0
        self._unanswered = Counter[str | None]()
        """Calls by their instances."""
        name = hashlib.sha256(service.shown.encode()).hexdigest()[:16]
        self._open = OpenInstances(cache_folder() / "environments" / name)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="environment", daemon=True)
        self._thread.start()
        for instance in [*self._open.ids]:
            self.begin(self._release(instance))
        atexit.register(self.close)

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def tasks(self, env_type: str, split: str) -> list[str]:
        """Their ids, in the order of the service. RowFailed when it does not tell them."""
        about = {"env_type": env_type, "params": {"split": split}}
        return await self.ask("get_env_profile", about, _ids, frozenset())

    @asynccontextmanager
    async def instance(self, env_type: str, task_id: str) -> AsyncIterator[Instance]:
        """Released whatever happens. RowFailed when there is none."""
        if self._silent >= MOST_SILENT and self._loop.time() < self._gone_until:
            what = f"the service is gone, {self._silent} calls in a row had no answer; start it"
            raise ServiceGone(Reason.CONNECT, f"{self._service.shown}: {what}")
        identity = uuid4().hex
        self._open.add(identity)
        try:
            about = {"env_type": env_type, "task_id": task_id, "instance_id": identity}
            yield Instance(self, identity, await self.ask("create", about, _state))
        finally:
            await self._release(identity)

    async def _release(self, instance: str) -> None:
        """It stays written down, for the next process, where it cannot be released, and where the
        service may still be about a call that nobody waits for, and begin it once more."""
        with suppress(RowFailed):
            await self.ask("release", {"instance_id": instance}, _success)
            if not self._unanswered[instance]:
                self._open.cross_out(instance)
                del self._unanswered[instance]

    async def ask(
        self,
        endpoint: str,
        fields: Mapping[str, Any],
        read: Callable[[Reply], T],
        repeated: frozenset[Reason] = _SILENT | {Reason.BAD_REPLY},
    ) -> T:
        """What `read` finds in the reply; its ValueError says what is wrong there. What fails for a
        reason that is `repeated` is asked three times; RowFailed says what was tried."""
        attempt, waited_s = 1, 0.0
        while True:
            try:
                found = read(await self._sent(endpoint, {**_EMPTY, **fields}))
            except _NoAnswer as error:
                failed = error
            except ValueError as error:
                failed = _NoAnswer(Reason.BAD_REPLY, f"the reply has {error}")
            else:
                self._silent = 0
                return found
            is_over = failed.reason not in repeated or failed.after_s > self._service.timeout_s
            if is_over or attempt == ATTEMPTS:
                break
            wait_s = random.uniform(0.3, 1) * self._service.retry_wait_s
            await asyncio.sleep(wait_s := max(failed.after_s, wait_s))
            attempt, waited_s = attempt + 1, waited_s + wait_s
        self._silent = self._silent + 1 if failed.reason in _SILENT else 0
        self._gone_until = self._loop.time() + GONE_S
        tried = f"; {attempt} attempts, {waited_s:.1f} s waited between them" * (attempt > 1)
        told = self._cleaned(f"{endpoint}: {failed}{tried}")
        raise RowFailed(failed.reason, f"{self._service.shown}/{told}")

    async def _sent(self, endpoint: str, fields: Mapping[str, Any]) -> Reply:
        import aiohttp

        service, data, instance = self._service, orjson.dumps(fields), fields["instance_id"]
        url, headers = f"{service.url.rstrip('/')}/{endpoint}", {"Content-Type": "application/json"}
        self._unanswered[instance] += 1
        try:
            async with (
                asyncio.timeout(service.timeout_s),
                self._session.post(url, data=data, headers=headers, allow_redirects=False) as reply,
            ):
                said = await reply.read()
        except TimeoutError:
            what = f"no answer within {service.timeout_s:g} s"
            raise _NoAnswer(Reason.TIMEOUT, what) from None
        except aiohttp.ClientConnectorError as error:
            self._unanswered[instance] -= 1
            raise _NoAnswer(Reason.CONNECT, str(error)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _NoAnswer(Reason.DROPPED, f"{type(error).__name__}: {error}") from None
        self._unanswered[instance] -= 1
        if not 200 <= reply.status < 300:
            after_s = retry_after(reply.headers) or 0.0
            wish = f"; it asks to wait {after_s:g} s" if after_s else ""
            what = f"HTTP {reply.status}: {_told(said)}{wish}"
            raise _NoAnswer(_reason_of(reply.status), what, after_s)
        try:
            return {**orjson.loads(said)}
        except (ValueError, TypeError):
            what = f"the reply is no JSON object: {_told(said)}"
            raise _NoAnswer(Reason.BAD_REPLY, what) from None

    @cached_property
    def _session(self) -> Any:
        """Keeps no connections: what a service has closed meanwhile looks like a dropped call."""
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0, force_close=True, ttl_dns_cache=_DNS_S)
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def close(self) -> None:
        """What goes on is broken off, and what is open is released, in ten seconds at most."""
        atexit.unregister(self.close)
        with suppress(KeyError):
            del open_clients[self._service]
        if not self._loop.is_closed():
            self.begin(self._end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        going_on = asyncio.all_tasks() - {asyncio.current_task()}
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                for task in going_on:
                    task.cancel()
                await asyncio.gather(*going_on, return_exceptions=True)
                left = [self._release(each) for each in self._open.ids]
                await asyncio.gather(*left, return_exceptions=True)
        self._open.close()
        if "_session" in vars(self):
            await self._session.close()


@dataclass(frozen=True)
class Instance:
    """A task that was begun, and its first state."""

    client: Client
    identity: str
    state: Sequence[Any]

    @property
    def messages(self) -> list[dict[str, str]]:
        """Of the state. ValueError when it has none, or one that is none."""
        for turn in self.state or [None]:
            texts = [isinstance(turn, dict) and turn.get(name) for name in ("role", "content")]
            if not all(isinstance(text, str) for text in texts):
                what = "expected messages with role and content as text"
                raise ValueError(f"its first state: {what}; have {turn!r:.100}")
        return [*self.state]

    async def step(self, action: dict[str, str]) -> None:
        """Not sent again where it may have been done: a second one is another conversation."""
        sent = {"instance_id": self.identity, "messages": action}
        await self.client.ask("step", sent, _object, _NOT_DONE)

    async def evaluate(self) -> float:
        sent = {"instance_id": self.identity, "params": {"sparse": False}}
        return await self.client.ask("evaluate", sent, _reward)


class _NoAnswer(Exception):
    def __init__(self, reason: Reason, what: str, after_s: float = 0.0) -> None:
        super().__init__(what)
        self.reason, self.after_s = reason, after_s


_EMPTY = {"env_type": "default", "task_id": None, "instance_id": None, "messages": {}, "params": {}}


def _reason_of(status: int) -> Reason:
    if status == 429:
        return Reason.RATE_LIMITED
    is_passing = status in RETRIED_STATUS or status >= 500
    return Reason.SERVER_ERROR if is_passing else Reason.BAD_REQUEST


def _told(said: bytes) -> str:
    """The text, or the end of what stands as `detail`: a traceback, for one."""
    text = said.decode(errors="replace")
    with suppress(ValueError, TypeError, LookupError):
        text = str(orjson.loads(said)["detail"]).strip().rpartition("\n")[2]
    return short(" ".join(text.split())) or "nothing"


def _ids(reply: Reply) -> list[str]:
    listed = _of("list of ids", reply.get("data", reply.get("task_ids", [])), list)
    return [str(_of("id", each, str, int)) for each in listed]


def _state(reply: Reply) -> list[Any]:
    """Of one message or several."""
    state = _of("state", _object(reply).get("state"), list, dict)
    return state if isinstance(state, list) else [state]


def _object(reply: Reply) -> Reply:
    return _of("object as data", reply.get("data"), dict)


def _reward(reply: Reply) -> float:
    return float(_of("number as data", reply.get("data"), int, float))


def _success(reply: Reply) -> bool:
    return _of("success", reply.get("success"), bool)


def _of(what: str, value: object, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"no {what}; have {value!r:.100}")
    return value
