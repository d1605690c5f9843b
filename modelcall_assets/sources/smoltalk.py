"""SmolTalk: conversations of many turns, to train on."""

from __future__ import annotations

from typing import Any, ClassVar

from modelcall_assets.records.outcome import Row
from modelcall_assets.sources.base import Conversation, HubSource, check_turns


class SmolTalk(HubSource):
    """One may begin with a system turn, and end with the user's."""

    hub = "HuggingFaceTB/smol-smoltalk"
    subsets: ClassVar = {None: ("train", "test")}
    columns: ClassVar = {"messages": list}

    def __init__(self, split: str, **options: Any) -> None:
        """`options` as of any source of the Hub."""
        super().__init__(None, split, **options)

    def conversation(self, row: Row) -> Conversation:
        messages: list[Any] = row["messages"]
        match messages:
            case [{"role": "system", "content": str()}, *rest]:
                check_turns(rest)
            case _:
                check_turns(messages)
        return {"messages": messages}
