"""`code`: does the answer's program pass the tests of its row, as in HumanEval?"""

import re
from collections.abc import Sequence
from typing import Any

from modelcall_assets.grading.item import response_of
from modelcall_assets.grading.sandbox import AT_ONCE, check_sandbox, run_trial
from modelcall_assets.records.outcome import Row

_BLOCK = re.compile(r"```(?:python)?[ \t\r]*\n(.*?)\n[ \t]*```[ \t\r]*(?:\n|$)", re.DOTALL)


class Code:
    """Rates a row with `messages`, whose last user turn is the prompt, `entry_point`, `test` and
    `response`. Its program and its tests run in two sandboxed processes, within `timeout_s` seconds
    and `memory_mb` megabytes each."""

    fields = {  # noqa: RUF012
        "correct": {"type": "boolean"},
        "why": {"type": "string"},
        "timeout": {"type": "boolean"},
        "memory_exceeded": {"type": "boolean"},
        "stdout": {"type": "string"},
        "stderr": {"type": "string"},
    }

    concurrency = AT_ONCE

    def __init__(self, timeout_s: float = 5, memory_mb: int = 256) -> None:
        self._limits = timeout_s, memory_mb

    def check_ready(self) -> None:
        """SetupError where this machine has no sandbox, and why."""
        check_sandbox(*self._limits)

    def wanted(self, item: Row) -> Sequence[str]:
        """The prompt, the test and the name of what is tested."""
        turns = item.get("messages") or ()
        asked = [turn.get("content") for turn in turns if turn.get("role") == "user"] or [None]
        needed = asked[-1], item.get("test"), item.get("entry_point")
        texts = [text for text in needed if isinstance(text, str) and text]
        if len(texts) < len(needed):
            raise ValueError("the item lacks a user turn, `test` or `entry_point`: it is no code")
        return texts

    def score(self, item: Row) -> dict[str, Any]:
        """SetupError where there is no sandbox (any more); nothing that an answer does raises."""
        prompt, test, entry_point = self.wanted(item)
        if not (response := response_of(item)).strip():
            why = "there is no response"
            return {**dict.fromkeys(self.fields), "correct": False, "why": why}
        program = f"{imports(prompt)}\n\n{unwrapped(response)}"
        return run_trial(program, prompt, test, entry_point, *self._limits)


def imports(prompt: str) -> str:
    """The import lines that a prompt begins with, between comments and blank lines."""
    found: list[str] = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            found.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(found)


def unwrapped(response: str) -> str:
    """The first block between ``` or ```python and ```, each at its line's end; else all of it."""
    block = _BLOCK.search(response)
    return (block[1] if block else response).strip()
