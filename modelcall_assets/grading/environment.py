"""`environment`: the reward that an environment service gives for the response, as one step."""

from dataclasses import dataclass
from typing import Any, ClassVar

from modelcall_assets.grading.item import one_of, response_of
from modelcall_assets.records.outcome import Row
from modelcall_assets.sources.env_service import Service, run


@dataclass
class Environment(Service):
    """Grades a row of such a task, which is begun anew, of up to `concurrency` at once. `correct`
    is a reward of 1 or more; `reward` is that, or by the formula `judge` half of it, and 1 more
    where it is correct; `raw` is what the service gave."""

    formula: str = "raw"
    concurrency: int = 8
    fields: ClassVar = {
        "correct": {"type": "boolean"},
        "reward": {"type": "number"},
        "raw": {"type": "number"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("formula", self.formula, "raw", "judge")
        if type(self.concurrency) is not int or self.concurrency < 1:
            raise ValueError(f"concurrency: expected 1 or more; have {self.concurrency!r}")

    def wanted(self, item: Row) -> tuple[str, str]:
        """Environment and task."""
        named = item.get("env_type"), item.get("task_id")
        texts = [text for text in named if isinstance(text, str) and text]
        if len(texts) < len(named):
            raise ValueError("the item has no `env_type` and `task_id`: it is of no environment")
        return texts[0], texts[1]

    def score(self, item: Row) -> dict[str, Any]:
        """RowFailed when the service gives no reward, ValueError for an item of another state."""
        raw = run(self._raw(item))
        correct = raw >= 1
        reward = 0.5 * raw + correct if self.formula == "judge" else raw
        return {"correct": correct, "reward": reward, "raw": raw}

    async def _raw(self, item: Row) -> float:
        env_type, task = self.wanted(item)
        async with self.instance(env_type, task) as instance:
            if instance.messages != item.get("messages"):
                what = "begins otherwise now than when it was asked: another task, or a random one"
                raise ValueError(f"task {task} {what}")
            await instance.step({"role": "assistant", "content": response_of(item)})
            return await instance.evaluate()
