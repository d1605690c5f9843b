"""Fields of a file with their references replaced, and what to say where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic_core import PydanticCustomError

from modelcall_assets.config.environment import Environment, MissingVariable
from modelcall_assets.config.problems import problem_of
from modelcall_assets.errors import Problem


@dataclass
class Expander:
    """Replaces references in fields of one file; what is wrong goes to `problems`."""

    env: Environment
    file: str
    problems: list[Problem] = field(default_factory=list[Problem], kw_only=True)

    def text(self, place: str, text: str | None, check: Callable[[str], str]) -> str | None:
        """The text with its references replaced, if it passes."""
        if text is None:
            return None
        try:
            value = self.env.expand(text)
        except MissingVariable as error:
            self.unready(place, f"variable {error.name} is not set", text)
            return None
        if not value:
            self.unready(place, f"{text} is empty", text)
            return None
        try:
            return check(value)
        except PydanticCustomError as error:
            self.problems.append(problem_of(error, self.file, place, text))
            return None

    def unready(self, place: str, wrong: str, text: str) -> None:
        """The file is right, but the environment lacks what it refers to."""
        fix = (
            f"the task cannot run until {text} has a value "
            "in .env, in the task's env file or in the process"
        )
        self.problems.append(Problem(self.file, place, wrong, fix=fix, unready=True))
