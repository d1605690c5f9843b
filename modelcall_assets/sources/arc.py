"""ARC: questions of science at school, Easy and Challenge, with three to five choices."""

from __future__ import annotations

from typing import ClassVar

from modelcall_assets.records.outcome import Row
from modelcall_assets.sources.base import Conversation, HubSource, dialogue, render_mc

_SPLITS = ("train", "validation", "test")


class ARC(HubSource):
    """`letters` are the row's own labels: A to E, or 1 to 5."""

    hub = "allenai/ai2_arc"
    subsets: ClassVar = {"ARC-Easy": _SPLITS, "ARC-Challenge": _SPLITS}
    columns: ClassVar = {"question": str, "choices": dict, "answerKey": str}
    grader, baseline, eval_type = "choice", 0.25, "categorical"

    def conversation(self, row: Row) -> Conversation:
        choices, letters = row["choices"].get("text"), row["choices"].get("label")
        if not (isinstance(choices, list) and isinstance(letters, list)):
            raise ValueError("choices: expected the lists text and label")
        if len(choices) != len(letters):
            raise ValueError(f"choices: {len(choices)} texts and {len(letters)} labels")
        if row["answerKey"] not in letters:
            have = f"expected one of {', '.join(map(str, letters))}; have {row['answerKey']!r}"
            raise ValueError(f"answerKey: {have}")
        question = render_mc(row["question"], letters, choices)
        return dialogue(question, row["answerKey"], letters=letters)
