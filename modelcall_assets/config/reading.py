"""What a task may say of how its input files are read."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import AfterValidator

from modelcall_assets.config.block import Text, did_you_mean, mistake

_COMMON = (
    *("utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030", "gbk", "big5", "shift_jis", "euc_kr"),
    *("latin-1", "cp1252"),
)


def _codec(name: str) -> str:
    """The name as Python spells it."""
    try:
        "".encode(name)  # unlike a lookup it refuses codecs that are not of text, such as hex
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        raise mistake(
            "unknown encoding",
            expected=f"one that Python knows, such as {', '.join(_COMMON)}",
            fix=did_you_mean(name, _COMMON),
        ) from None


Encoding = Annotated[Text, AfterValidator(_codec)]
OnBadLine = Literal["keep", "fail"]
OnEmptyFile = Literal["accept", "fail"]
