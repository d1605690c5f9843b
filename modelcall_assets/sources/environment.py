"""Tasks of an environment service of AgentScope Tuner. An answer to one is one step: conversations
of several steps with an environment are not made."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from functools import cached_property
from typing import Any

import orjson

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import RowFailed
from modelcall_assets.sources.base import Conversation, Source
from modelcall_assets.sources.env_service import Client, Service, ServiceGone


class EnvironmentTasks(Source):
    """The tasks of an environment's split, in the order of the service; the conversation is how one
    begins. So many at once are begun `ahead`."""

    def __init__(
        self,
        env_type: str,
        url: str,
        split: str = "train",
        ahead: int = 8,
        timeout_s: float = 300.0,
        retry_wait_s: float = 10.0,
        **slicing: Any,
    ) -> None:
        super().__init__(**slicing)
        for name, value in (("env_type", env_type), ("split", split)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name}: expected a text; have {value!r}")
        if type(ahead) is not int or ahead < 1:
            raise ValueError(f"ahead: expected 1 or more; have {ahead!r}")
        self.service = Service(url, timeout_s, retry_wait_s)
        self._env_type, self._split, self._most = env_type, split, ahead
        self._ahead, self._asked = (dict[int, Future[Conversation]]() for _ in range(2))

    @property
    def name(self) -> str:
        return f"{super().name}/{self._env_type}/{self._split}"

    def num_examples(self) -> int:
        return len(self._ids)

    def version(self) -> str:
        """Of the ids that the service has now. InputError when it does not tell them."""
        told = orjson.dumps([self._env_type, self._split, self._listed()])
        return hashlib.sha256(told).hexdigest()[:32]

    def get_example(self, index: int) -> Conversation:
        """Begun once. InputError names the task that cannot be, ServiceGone says that there is no
        use in asking for the next one."""
        task = self._ids[index]
        if index not in self._asked:
            for near in (index, *range(index, self.indices.stop, self.indices.step)[: self._most]):
                if near == index or len(self._ahead) < self._most:
                    self._begin(near)
            self._asked[index] = self._ahead.pop(index)
        try:
            return self._asked[index].result()
        except ServiceGone:
            raise
        except (RowFailed, ValueError) as error:
            raise InputError(f"{self.name}, task {task}: {error}") from error

    def _begin(self, index: int) -> None:
        if index not in self._ahead and index not in self._asked:
            client = self.service.client()
            self._ahead[index] = client.begin(self._conversation(client, self._ids[index]))

    async def _conversation(self, client: Client, task: str) -> Conversation:
        async with client.instance(self._env_type, task) as instance:
            messages = instance.messages
        about = {"task_id": task, "env_type": self._env_type, "main_query": messages[-1]["content"]}
        return {"id": task, "messages": messages, **about, "metadata": {"split": self._split}}

    @cached_property
    def _ids(self) -> list[str]:
        if ids := self._listed():
            return ids
        what = f"no tasks in the split {self._split!r} of the environment {self._env_type!r}"
        raise InputError(f"{self.service.shown}: {what}; correct one of the three")

    def _listed(self) -> list[str]:
        client = self.service.client()
        return client.begin(client.tasks(self._env_type, self._split)).result()
