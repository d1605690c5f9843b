"""GSM8K: sums in words, whose answers call a calculator and end in `#### <number>`."""

from __future__ import annotations

import re
from typing import ClassVar

from modelcall_assets.records.outcome import Row
from modelcall_assets.sources.base import Conversation, HubSource, dialogue

_CALL = re.compile(r"<<([^>]*)>>")


class GSM8K(HubSource):
    hub = "openai/gsm8k"
    subsets: ClassVar = {"main": ("train", "test"), "socratic": ("train", "test")}
    columns: ClassVar = {"question": str, "answer": str}
    grader, eval_type = "numeric", "generative"

    def conversation(self, row: Row) -> Conversation:
        return dialogue(row["question"], parts_of(row["answer"]))

    def reward(self, conversation: Conversation, completion: str) -> float:
        """1 for a right completion, else 0."""
        return float(self.evaluate(conversation, completion))


def parts_of(answer: str) -> list[dict[str, str]]:
    """`<<expression=result>>` is a part `python` and its `python_output`, cut at the last `=`. What
    is before, between and behind such calls are parts `text`, empty ones too."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(_CALL.split(answer)):
        if number % 2 == 0:
            parts.append({"type": "text", "text": text})
            continue
        before, sign, behind = text.rpartition("=")
        expression, result = (before, behind) if sign else (text, "")
        parts.append({"type": "python", "text": expression})
        parts.append({"type": "python_output", "text": result})
    return parts


def text_of(content: str | list[dict[str, str]]) -> str:
    """The answer whose parts these are."""
    if isinstance(content, str):
        return content
    written = ""
    for part in content:
        kind, text = part["type"], part["text"]
        if kind == "python":
            written += f"<<{text}"
        else:
            written += f"{text and '='}{text}>>" if kind == "python_output" else text
    return written
