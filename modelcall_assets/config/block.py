"""What every config model is made of: the strict base class, limits, and mistakes that explain."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Block(BaseModel):
    """A mapping in a config file: known keys only, exact types, read only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_under_the_key(cls, value: Any) -> Any:
        return {} if value is None else value


def _no_limit(value: Any) -> Any:
    return None if type(value) is int and value == -1 else value


Limit = Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(_no_limit)]
"""A count; -1 and null mean no limit."""

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[Text], BeforeValidator(_as_list)]
"""Several; one may stand by itself."""


def mistake(wrong: str, *, expected: str = "", fix: str = "") -> PydanticCustomError:
    """What a validator raises; the parts become those of a `Problem`."""
    context: dict[str, Any] = {"wrong": wrong, "expected": expected, "fix": fix}
    return PydanticCustomError("mistake", "{wrong}", context)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that `name` was probably meant to be."""
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`did you mean x?`, or nothing when no name is close."""
    close = nearest(name, names)
    return f"did you mean {close}?" if close else ""
