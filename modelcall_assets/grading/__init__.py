"""Graders: scorers that compare a response with the reference of its item by a rule, one file each.

`correct` is the figure; `answer` is what was taken for the answer, null where there is none. An
option that cannot be is a ValueError of the constructor. Any response can be graded.
"""

from typing import Any, Protocol

from modelcall_assets.grading.choice import Choice
from modelcall_assets.grading.code import Code
from modelcall_assets.grading.environment import Environment
from modelcall_assets.grading.exact import Exact
from modelcall_assets.grading.numeric import Numeric
from modelcall_assets.grading.own import Own
from modelcall_assets.grading.regex import Regex
from modelcall_assets.grading.spelling import Spelling
from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms.user_code import Scorer


class Grader(Scorer, Protocol):
    """`wanted` is what an answer to an item is compared with; ValueError where the item lacks it:
    then nobody is asked."""

    def wanted(self, item: Row) -> Any: ...


GRADERS: dict[str, type[Grader]] = {
    "choice": Choice,
    "code": Code,
    "environment": Environment,
    "exact": Exact,
    "numeric": Numeric,
    "own": Own,
    "regex": Regex,
    "spelling": Spelling,
}
"""By their names in a task file."""
