"""HumanEval: functions of Python to be completed, graded by running their tests."""

from __future__ import annotations

from typing import Any, ClassVar

from modelcall_assets.records.outcome import Row
from modelcall_assets.sources.base import Conversation, HubSource, dialogue


class HumanEval(HubSource):
    hub = "openai/openai_humaneval"
    subsets: ClassVar = {None: ("test",)}
    columns: ClassVar = dict.fromkeys(("prompt", "canonical_solution", "entry_point", "test"), str)
    grader, eval_type = "code", "generative"

    def __init__(self, split: str = "test", **options: Any) -> None:
        """`options` as of any source of the Hub."""
        super().__init__(None, split, **options)

    def conversation(self, row: Row) -> Conversation:
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        extras = {"entry_point": row["entry_point"], "test": row["test"]}
        return dialogue(row["prompt"], solution, **extras)
