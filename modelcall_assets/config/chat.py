"""The part of a model file that becomes the request body."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from modelcall_assets.config.block import Block, Limit, Text, mistake


def _one_answer(count: int) -> int:
    if count != 1:
        raise mistake("a record has one answer", expected="1", fix="remove n")
    return count


_NOT_EXTRA = ("messages", "model", "n", "stream", "stream_options")


def _extra_body(body: dict[str, Any]) -> dict[str, Any]:
    if taken := [name for name in _NOT_EXTRA if name in body]:
        raise mistake(f"{', '.join(taken)} cannot be set here", fix="remove it")
    return body


class Sampling(Block):
    """Fields of the request body; a key not listed here is passed through with a warning."""

    model_config = ConfigDict(extra="allow")

    temperature: Annotated[float, Field(ge=0)] | None = None
    """Sampling temperature."""
    max_tokens: Limit = None
    """Most tokens of an answer."""
    max_completion_tokens: Limit = None
    """The same, for models that count reasoning in it."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling."""
    top_k: int | None = None
    """Samples from the k likeliest tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least probability relative to the likeliest token."""
    frequency_penalty: float | None = None
    """Penalty by count of earlier uses."""
    presence_penalty: float | None = None
    """Penalty for any earlier use."""
    repetition_penalty: float | None = None
    """Multiplicative penalty for repeats."""
    stop: str | list[str] | None = None
    """Text or texts that end the answer."""
    seed: int | None = None
    """Seed of the sampling, where the endpoint supports one."""
    n: Annotated[int, AfterValidator(_one_answer)] | None = None
    """1: a record has one answer."""
    logit_bias: dict[str, float] | None = None
    """Token id → bias."""
    response_format: dict[str, Any] | None = None
    """Passed as it is."""
    reasoning: dict[str, Any] | None = None
    """Passed as it is."""
    reasoning_effort: Text | None = None
    """low, medium, high, or what else the model knows."""
    stream: bool | None = None
    """Whether the answer comes in pieces, so that no proxy takes a long thought for a dead line."""
    stream_options: dict[str, Any] | None = None
    """Sent with `stream: true` only; default `include_usage: true`, and `{}` sends none."""
    user: str | None = None
    """Passed as it is; never part of a request's identity."""
    extra_body: Annotated[dict[str, Any], AfterValidator(_extra_body)] = Field(
        default_factory=dict[str, Any]
    )
    """More fields, merged into the request body."""


class ChatConfig(Sampling):
    """The model and how it is asked."""

    model: Text
    """Name of the model at the endpoint."""

    def streaming(self) -> dict[str, Any]:
        """The fields that ask for a stream, if one is wanted."""
        if not self.stream:
            return {}
        given = self.stream_options
        options = {"include_usage": True} if given is None else given
        return {"stream": True, "stream_options": options} if options else {"stream": True}
