"""`spelling`: words spelt, or their letters counted."""

from typing import Any

from modelcall_assets.grading.exact import Exact
from modelcall_assets.grading.item import ByAnswer, reference_of
from modelcall_assets.grading.numeric import Numeric, marked_number
from modelcall_assets.records.outcome import Row


class Spelling(ByAnswer):
    """Where the reference has a count (SpellingBee) that is graded as `numeric` does it; where it
    is a spelling (SimpleSpelling) the response must be its text, as `exact` has it."""

    wanted = staticmethod(reference_of)

    def score(self, item: Row) -> dict[str, Any]:
        is_spelling = marked_number(self.wanted(item)) is None
        return (Exact() if is_spelling else Numeric()).score(item)
