"""The scorer of `modelcall pipeline`."""


class Length:
    """A point for every hundred characters of `text`, five at most."""

    def score(self, item: dict[str, str]) -> dict[str, float]:
        return {"score": min(5.0, len(item["text"]) / 100)}
