"""Tasks of an environment service of AgentScope Tuner. An answer to one is one step: conversations
of several steps with an environment are not made."""

from __future__ import annotations

import hashlib
from asyncio import gather
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import orjson

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import RowFailed
from modelcall_assets.sources.base import Conversation, Source
from modelcall_assets.sources.env_service import Service, ServiceGone, run

LISTING_S = 3.0
"""For what a listing, a check or a sensor asks in passing."""


class EnvironmentTasks(Source):
    """The tasks of an environment's split, in the order of the service; the conversation is how one
    begins. So many at once are begun, `ahead` of what is asked for."""

    is_service = True

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
        self._listing = Service(url, min(timeout_s, LISTING_S))
        self._env_type, self._split, self._ahead = env_type, split, ahead
        self._begun = dict[int, Conversation | InputError]()

    @property
    def name(self) -> str:
        return f"{super().name}/{self._env_type}/{self._split}"

    def num_examples(self) -> int:
        return len(self._ids)

    def version(self) -> str:
        """Of the ids that were read, else of those that the service has now. InputError when it
        does not tell them within seconds."""
        ids = self._ids if "_ids" in vars(self) else self._told(self._listing)
        told = orjson.dumps([self._env_type, self._split, ids])
        return hashlib.sha256(told).hexdigest()[:32]

    def get_example(self, index: int) -> Conversation:
        """InputError names the task that cannot be begun, ServiceGone says that there is no use in
        asking for the next one."""
        if index not in self._begun:
            following = range(index, self.indices.stop, self.indices.step)[: self._ahead]
            self._begun = run(self._begin(following or [index]))
        found = self._begun[index]
        if isinstance(found, InputError):
            raise found
        return found

    async def _begin(self, indices: Sequence[int]) -> dict[int, Conversation | InputError]:
        return dict(zip(indices, await gather(*map(self._conversation, indices)), strict=True))

    async def _conversation(self, index: int) -> Conversation | InputError:
        task = self._ids[index]
        try:
            async with self.service.instance(self._env_type, task) as instance:
                messages = instance.messages
        except ServiceGone as error:
            return error
        except (RowFailed, ValueError) as error:
            return InputError(f"{self.name}, task {task}: {error}")
        about = {"task_id": task, "env_type": self._env_type, "main_query": messages[-1]["content"]}
        return {"id": task, "messages": messages, **about, "metadata": {"split": self._split}}

    @cached_property
    def _ids(self) -> list[str]:
        if ids := self._told(self.service):
            return ids
        what = f"no tasks in the split {self._split!r} of the environment {self._env_type!r}"
        raise InputError(f"{self.service.shown}: {what}; correct one of the three")

    def _told(self, service: Service) -> list[str]:
        return run(service.tasks(self._env_type, self._split))
