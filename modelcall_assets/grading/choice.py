"""`choice`: multiple choice, by what the model wrote or by the probabilities of the letters."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelcall_assets.grading.item import ByAnswer, one_of, reference_of, response_of
from modelcall_assets.records.outcome import Row


@dataclass(frozen=True)
class Choice(ByAnswer):
    """`by: text`: the response, stripped, must be one of the item's `letters`. Of a longer one,
    `in_sentence` takes the first letter that stands by itself behind the last "answer", else the
    only one that does. `by: logprobs`: the letter that is likeliest as the first token."""

    by: str = "text"
    in_sentence: bool = False

    def __post_init__(self) -> None:
        one_of("by", self.by, "text", "logprobs")
        one_of("in_sentence", self.in_sentence, False, True)
        if self.in_sentence and self.by == "logprobs":
            raise ValueError("in_sentence: has no effect with `by: logprobs`; leave it out")

    def wanted(self, item: Row) -> tuple[Sequence[str], str]:
        """The letters, and the right one."""
        if not (letters := item.get("letters")):
            raise ValueError("the item has no `letters` to choose from")
        return letters, reference_of(item)

    def score(self, item: Row) -> dict[str, Any]:
        letters, reference = self.wanted(item)
        if self.by == "logprobs":
            answer = _likeliest(letters, item.get("logprobs") or {})
        else:
            text = response_of(item).strip()
            longer = _standing_alone(letters, text) if self.in_sentence else None
            answer = text if text in letters else longer
        return {"correct": answer == reference, "answer": answer}


def _standing_alone(letters: Sequence[str], text: str) -> str | None:
    one = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, letters))})(?!\.?\w)")
    last = re.search("(?is).*answer(.*)", text)
    if last and (found := one.search(last[1])):
        return found[0]
    everywhere = {*one.findall(text)}
    return everywhere.pop() if len(everywhere) == 1 else None


def _likeliest(letters: Sequence[str], logprobs: Mapping[str, float]) -> str:
    """White space around a token does not count. Of two as likely, the first."""
    shares = dict.fromkeys(letters, 0.0)
    for token, logprob in logprobs.items():
        if token.strip() in shares:
            shares[token.strip()] += math.exp(logprob)
    if not any(shares.values()):
        wrong = "has none of the letters" if logprobs else "is not there: the endpoint gave none"
        raise ValueError(f"column logprobs {wrong}; see generate_response.logprobs")
    return max(shares, key=lambda letter: shares[letter])
