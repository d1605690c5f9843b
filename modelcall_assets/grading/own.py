"""`own`: each item by the grader of its source, for mixtures."""

from typing import Any

from modelcall_assets.grading.item import ByAnswer
from modelcall_assets.records.outcome import Row


class Own(ByAnswer):
    def wanted(self, item: Row) -> Any:
        return _grader_of(item).wanted(item)

    def score(self, item: Row) -> dict[str, Any]:
        return _grader_of(item).score(item)


def _grader_of(item: Row) -> Any:
    from modelcall_assets.grading import GRADERS

    if (name := item.get("grader")) not in GRADERS:
        raise ValueError(f"column grader: expected one of {', '.join(GRADERS)}; have {name!r}")
    return GRADERS[name]()
