"""What the rehearsal model draws where a question has one right answer, so that some are right; and
how likely it says that its tokens were.

The same seed draws the same.
"""

import operator
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import reduce
from math import log
from random import Random
from typing import Any

_ONLY_A_LETTER = "Respond only with the letter of the correct answer."
_CHOICE = re.compile(r"^- .*=(\S+)$", re.MULTILINE)
_SPELL = re.compile(r"Spell the word: (\w+)")
_LETTER = re.compile(r"(?<![\w'])[\"']?([a-z])(?:[\"']|'?s)?(?!\w)", re.IGNORECASE)
_IN_WORD = re.compile(r"\b(?:in|word|does)\s+[\"']?([a-z]{2,})", re.IGNORECASE)
_LONGEST_OF_A_WORD = 120
"""Characters of a question about the letters of a word; those about anything else are longer, or
have numbers."""
_COUNTS = re.compile(r"\bhow (?:many|often)\b|count|number|frequency", re.IGNORECASE)
_HOW_MANY = re.compile(r"####|\bhow (?:many|much)\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_MOST_NUMBERS = 6
_WAYS = operator.add, operator.sub, operator.mul
_TOKEN = re.compile(r" ?[^\W\d]+|\d|\W")
_DIGITS = tuple("0123456789")
_WORDS = (
    "The", "This", "I", "It", "We", "Let", "To", "An", "In", "Yes", "No", "Sure", "Here", "So",
    "First", "Well", "My", "As", "**", "\n",
)  # fmt: skip


def letters_in(question: str) -> list[str]:
    """Of its choices, if it wants one of them and nothing else."""
    wants_one = question.rstrip().endswith(_ONLY_A_LETTER)
    return [*dict.fromkeys(_CHOICE.findall(question))] if wants_one else []


def spelling(question: str, seed: bytes) -> str | None:
    """Of the word that is asked for, else with the count of a letter in it behind `#### `. One in
    four has a letter too many; None where nothing of the kind is asked."""
    draw, letter = Random(seed), ""
    if (asked := _SPELL.search(question)) is not None:
        word = asked[1]
    else:
        found, words = _LETTER.search(question), _IN_WORD.findall(question)
        is_other = len(question) > _LONGEST_OF_A_WORD or _NUMBER.search(question)
        if found is None or not words or is_other or not _COUNTS.search(question):
            return None
        letter, word = found[1], words[-1]
    spelt = [*word]
    if draw.random() < 0.25:
        spelt.insert(draw.randrange(len(word)), letter or draw.choice(word))
    told = f"{word}:{','.join(spelt)}"
    return f"{told}\n\n#### {spelt.count(letter)}" if letter else told


def number(question: str, told: str, seed: bytes) -> str | None:
    """The numbers of the question put together from left to right, by operations that are drawn.
    None where neither it nor all that is `told` asks for a number."""
    if not (_HOW_MANY.search(question) or "####" in told):
        return None
    draw = Random(seed)
    found = [Decimal(each.replace(",", "")) for each in _NUMBER.findall(question)]
    found = found[:_MOST_NUMBERS] or [Decimal(draw.randrange(10))]
    return f"{reduce(lambda one, other: draw.choice(_WAYS)(one, other), found):f}"


def with_logprobs(text: str, letters: Sequence[str], most: int, seed: bytes) -> list[Any]:
    """The tokens of an answer as chat completions have them, each with the `most` likeliest in its
    place: itself first, then the `letters` or digits that it is one of, then any words."""
    draw, content = Random(seed), list[dict[str, Any]]()
    for token in _TOKEN.findall(text):
        same = next((kind for kind in (letters, _DIGITS) if token in kind), ())
        tokens = [*dict.fromkeys((token, *draw.sample(same, len(same)), *_WORDS))]
        shares = sorted((draw.expovariate(1) ** 3 + 1e-9 for _ in tokens), reverse=True)
        ranked = [
            {"token": each, "logprob": log(share / sum(shares)), "bytes": [*each.encode()]}
            for each, share in zip(tokens, shares, strict=True)
        ]
        content.append({**ranked[0], "top_logprobs": ranked[:most]})
    return content
