"""Mistakes of the set-up, and every exception of the package: a `RunStopped` ends a run, any other
a command or a file."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in the user's set-up; `str()` gives the one-line form of every message."""

    file: str
    field: str
    wrong: str
    expected: str = ""
    have: str = ""
    fix: str = ""
    severity: Literal["error", "warning"] = "error"
    unready: bool = False
    """The files are right, but the task cannot run here: it stops a run, and `modelcall check` only
    warns of it."""
    line: int | None = None
    """Of the file, from 1."""

    def __str__(self) -> str:
        expected = self.expected and f"expected {self.expected}"
        parts = self.wrong, expected, self.have and f"found {self.have}", self.fix
        place = f"{self.file}:{self.field}" if self.field else self.file
        line = "" if self.line is None else f" (line {self.line})"
        return f"{place}: {'; '.join(filter(None, parts))}{line}"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that `name` was probably meant to be."""
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`did you mean x?`, or nothing when no name is close."""
    close = nearest(name, names)
    return f"did you mean {close}?" if close else ""


class ModelcallError(Exception):
    """Root of the tree."""


class SetupError(ModelcallError):
    """Config, paths or environment are wrong: printed without a traceback. `problems` lists every
    mistake found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class InputError(ModelcallError):
    """An input file cannot be read as what it claims to be, and fails; the message names the file
    and the place."""


class BatchOutstanding(ModelcallError):
    """A batch of this file goes on where this run cannot collect it; asking would pay twice."""


class InHand(ModelcallError):
    """Another run on this machine asks a model for this file now; asking too would pay twice."""


class RunStopped(ModelcallError):
    """The run cannot go on. Nothing is published; every reply received is in the journal."""


class EndpointRefused(RunStopped):
    """401, 403, an unknown model or an exhausted quota: asking again cannot help."""


class EndpointDown(RunStopped):
    """Record after record failed for the same transport reason."""


class BudgetSpent(RunStopped):
    """The task's `budget_usd` or `budget_tokens` is used up."""


class InputChanged(RunStopped):
    """The input no longer has the content its `raw` asset recorded."""


class StoreError(RunStopped):
    """A disk or store cannot be written, or does not answer; the message says what to check."""


class WorkerDied(RunStopped):
    """One of the processes that share the rows of a file ended without an answer."""


class PlaceTaken(RunStopped):
    """A file at an output's place is not what we published, and may not be replaced."""


class PublishedMeanwhile(RunStopped):
    """Another run has published the partition since this one began, with other content."""
