"""`regex`: what a regular expression finds in the response."""

import re
from dataclasses import dataclass
from typing import Any

from modelcall_assets.grading.item import ByAnswer, reference_of, response_of
from modelcall_assets.records.outcome import Row


@dataclass(frozen=True)
class Regex(ByAnswer):
    """The `group` of the first match of the `pattern` must be the `value`. Where there is none, it
    must be what the pattern finds in the reference, or, if that is nothing, the whole reference,
    stripped. Nothing found is never right."""

    pattern: str
    group: int | str = 0
    value: str | None = None

    def __post_init__(self) -> None:
        try:
            pattern = re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern: no regular expression: {error}") from error
        groups = [*range(pattern.groups + 1), *pattern.groupindex]
        if self.group not in groups:
            expected = ", ".join(map(str, groups))
            raise ValueError(f"group: not of the pattern; expected {expected}; have {self.group!r}")
        if not isinstance(self.value, str | None):
            raise ValueError(f"value: wrong type; expected text; have {self.value!r}; quote it")

    def wanted(self, item: Row) -> str:
        if self.value is not None:
            return self.value
        found = self._find(reference := reference_of(item))
        return reference.strip() if found is None else found

    def score(self, item: Row) -> dict[str, Any]:
        answer, wanted = self._find(response_of(item)), self.wanted(item)
        return {"correct": answer == wanted, "answer": answer}

    def _find(self, text: str) -> str | None:
        found = re.search(self.pattern, text)
        return found[self.group] if found else None
