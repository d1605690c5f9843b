"""What graders read of an item: a row of a responses file."""

from typing import ClassVar

from modelcall_assets.llm.json_text import read
from modelcall_assets.records.outcome import Row


class ByAnswer:
    """A grader that takes a text of the response for its answer."""

    fields: ClassVar = {"correct": {"type": "boolean"}, "answer": {"type": "string"}}


def response_of(item: Row) -> str:
    """The model's answer without thoughts before it; empty where there is none."""
    text = item.get("response")
    if not isinstance(text, str):
        return ""
    spoken, _ = read(text)
    return text if text.strip() == spoken else spoken


def reference_of(item: Row) -> str:
    """The text of the conversation's last turn, the assistant's, its parts joined. ValueError where
    that is none."""
    match item.get("messages"):
        case [*_, {"role": "assistant", "content": str() as text}]:
            return text
        case [*_, {"role": "assistant", "content": [*parts]}]:
            return "".join(part["text"] for part in parts)
        case _:
            raise ValueError("the item has no reference: its last turn is not the assistant's")


def one_of(option: str, value: object, *allowed: object) -> None:
    """ValueError unless it is."""
    if value not in allowed:
        shown = ", ".join(str(each).lower() for each in allowed)
        raise ValueError(f"{option}: unknown value; expected {shown}; have {value!r}")
