"""The scorer of `modelcall pipeline`."""

from typing import Any, ClassVar


class Length:
    """A point for every hundred characters of `text`, five at most."""

    fields: ClassVar[dict[str, Any]] = {"score": {"type": "number"}}

    def score(self, item: dict[str, Any]) -> dict[str, float]:
        return {"score": min(5.0, len(item["text"]) / 100)}
