"""`numeric`: the number behind `#### `, as the answers of GSM8K end."""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from modelcall_assets.grading.item import ByAnswer, reference_of, response_of
from modelcall_assets.records.outcome import Row

_MARKED = re.compile(r"#### (-?[0-9.,]+)")


class Numeric(ByAnswer):
    """The numbers are compared as such: 18. is 18.0. One that is not there equals none."""

    wanted = staticmethod(reference_of)

    def score(self, item: Row) -> dict[str, Any]:
        answer, wanted = marked_number(response_of(item)), marked_number(self.wanted(item))
        if answer is None:
            return {"correct": False, "answer": None}
        text = f"{answer:f}"
        plain = text.rstrip("0").rstrip(".") if "." in text else text
        return {"correct": answer == wanted, "answer": plain}


def marked_number(text: str) -> Decimal | None:
    """The first one in the text, without its commas; None where there is none, or it is none."""
    if (found := _MARKED.search(text)) is None:
        return None
    try:
        return Decimal(found[1].replace(",", "")) or Decimal()  # not -0
    except InvalidOperation:
        return None
