"""`exact`: the response is the reference, character by character."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from modelcall_assets.grading.item import ByAnswer, one_of, reference_of, response_of
from modelcall_assets.records.outcome import Row


@dataclass(frozen=True)
class Exact(ByAnswer):
    """Both without white space around them, unless `strip` is false. `ignore_case` compares them as
    Unicode's full case folding has them; `normalize` by Unicode's form NFKC, each run of white
    space as one space. An empty response is never right."""

    strip: bool = True
    ignore_case: bool = False
    normalize: bool = False
    wanted = staticmethod(reference_of)

    def __post_init__(self) -> None:
        for option in ("strip", "ignore_case", "normalize"):
            one_of(option, getattr(self, option), False, True)

    def score(self, item: Row) -> dict[str, Any]:
        answer = self._read(response_of(item)) or None
        return {"correct": answer == self._read(self.wanted(item)), "answer": answer}

    def _read(self, text: str) -> str:
        if self.normalize:
            text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text))
        if self.ignore_case:
            text = text.casefold()
        return text.strip() if self.strip else text
