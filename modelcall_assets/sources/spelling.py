"""SpellingBee and SimpleSpelling: letters to count and words to spell, made of a list of words."""

from __future__ import annotations

import random
import string
from functools import cached_property
from pathlib import Path
from typing import Any

from modelcall_assets.errors import InputError
from modelcall_assets.sources.base import Conversation, Source, dialogue
from modelcall_assets.sources.data import OneFile
from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.places import Place

_OURS = Path(__file__).with_name("words.txt")
_FIRST_SEED = {"train": 0, "test": 10_000_000}
_QUESTIONS = tuple(Path(__file__).with_name("questions.txt").read_text("utf-8").splitlines())
_QUOTES = ("", "'", '"')


class _Words(Source):
    """`word_list` is a path, a key in a store or a URL of a text with a word in each line; without
    one, a short list of ours. `sha256` is of its content."""

    paths = ("word_list",)
    eval_type = "generative"

    def __init__(
        self,
        size: int = 1000,
        split: str = "train",
        word_list: str | Place = _OURS,
        sha256: str | None = None,
        **slicing: Any,
    ) -> None:
        super().__init__(**slicing)
        self._one_of("split", split, _FIRST_SEED)
        if type(size) is not int or size < 0:
            raise ValueError(f"size: expected a whole number of 0 or more; have {size!r}")
        self.size, self.split = size, split
        self.word_list = OneFile(word_list, "expected a text with a word in each line", sha256)
        self.origins = (self.word_list,)

    @property
    def name(self) -> str:
        return f"{super().name}/{self.split}"

    def num_examples(self) -> int:
        return self.size

    def random(self, index: int) -> random.Random:
        return random.Random(_FIRST_SEED[self.split] + index)

    @cached_property
    def words(self) -> list[str]:
        (file,) = self.word_list.ready()
        with open_input(file.place) as opened:
            content = opened.read()
        try:
            lines = content.decode().splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{file.place}: not UTF-8: {error}; write it again") from error
        words = [word for line in lines if (word := line.strip())]
        if not words:
            raise InputError(f"{file.place}: has no words")
        return words


class SpellingBee(_Words):
    grader = "spelling"

    def get_example(self, index: int) -> Conversation:
        draw = self.random(index)
        word = draw.choice(self.words)
        letter = draw.choice(word) if draw.random() < 0.9 else draw.choice(string.ascii_lowercase)
        template = draw.choice(_QUESTIONS)
        if draw.random() < 0.3:
            template = template.lower()
        around_letter, around_word = draw.choice(_QUOTES), draw.choice(_QUOTES)
        question = template.format(
            letter=f"{around_letter}{letter}{around_letter}",
            word=f"{around_word}{word}{around_word}",
        )
        if draw.random() < 0.5:
            question += "?"
        return dialogue(question, _counted(word, letter))

    def reward(self, conversation: Conversation, completion: str) -> float:
        """1 for a right completion, else 0."""
        return float(self.evaluate(conversation, completion))


class SimpleSpelling(_Words):
    def get_example(self, index: int) -> Conversation:
        word = self.random(index).choice(self.words)
        return dialogue(f"Spell the word: {word}", f"{word}:{','.join(word)}")

    @cached_property
    def words(self) -> list[str]:
        """In another order than SpellingBee has them."""
        words = [*super().words]
        random.Random(42).shuffle(words)
        return words


def _counted(word: str, letter: str) -> list[dict[str, str]]:
    """By hand, then by Python. No space stands before a character: that is another token."""
    lines, count = [f"Let me spell the word first.\n{word}:{','.join(word)}\n"], 0
    lines.append(f"Now I go through it and count each '{letter}'.")
    for number, character in enumerate(word, 1):
        count += character == letter
        hit = f" yes, that makes {count}" if character == letter else ""
        lines.append(f"{number}:{character}{hit}")
    lines.append(f"\nBy hand I find {count}.")
    call = f"{word!r}.count({letter!r})"
    return [
        {"type": "text", "text": "\n".join(lines)},
        {"type": "text", "text": "\n\nPython shall check that:\n\n"},
        {"type": "python", "text": call},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython says {count} too, so the answer is:\n\n#### {count}"},
    ]
