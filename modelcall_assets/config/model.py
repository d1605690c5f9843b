"""A model file of either generation, as one ModelConfig."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from modelcall_assets.config.block import Block, Text, nearest
from modelcall_assets.config.chat import ChatConfig, Sampling
from modelcall_assets.config.client import ClientConfig, Resolver, client_problems, places
from modelcall_assets.config.endpoint import BaseUrl, Endpoint, KeyReference
from modelcall_assets.config.environment import Environment
from modelcall_assets.config.legacy import MODEL_FIELDS, take_out
from modelcall_assets.config.problems import errors_in, validate
from modelcall_assets.errors import Problem

_PROVIDERS = {
    "openai": ("https://api.openai.com/v1", "${OPENAI_API_KEY}"),
    "deepseek": ("https://api.deepseek.com/v1", "${DEEPSEEK_API_KEY}"),
    "anthropic": ("https://api.anthropic.com/v1", "${ANTHROPIC_API_KEY}"),
}
_OTHER_PROVIDER = ("${BASE_URL}", "${API_KEY}")


class Prices(Block):
    """What tokens cost; unknown means that the cost is unknown, never 0."""

    usd_per_million_input_tokens: Annotated[float, Field(ge=0)] | None = None
    """US dollars for a million prompt tokens."""
    usd_per_million_output_tokens: Annotated[float, Field(ge=0)] | None = None
    """US dollars for a million completion tokens."""

    @property
    def pair(self) -> tuple[float | None, float | None]:
        """Of input and output."""
        return self.usd_per_million_input_tokens, self.usd_per_million_output_tokens


class BatchConfig(Block):
    """How batches are made and waited for."""

    poll_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest time between two looks at a batch; the first ones come sooner."""
    max_requests_per_file: Annotated[int, Field(ge=1, le=50_000)] = 50_000
    """Most requests of a batch; fewer where the provider's queue of tokens is small."""
    completion_window: Annotated[str, Field(pattern=r"^[1-9]\d*[hd]$")] = "24h"
    """Time in which the provider has to answer; OpenAI knows `24h` only."""


class ModelFile(Block):
    """What both generations of model files may hold."""

    mode: Literal["live", "batch"] = "live"
    """`batch` sends files of requests to OpenAI's Batch API: cheaper, within a day."""
    batch: BatchConfig = BatchConfig()
    """For `mode: batch`."""
    prices: Prices = Prices()
    """What tokens cost."""
    supports_json_schema: bool = False
    """Whether the endpoint takes `response_format: json_schema`."""
    revision: str | None = None
    """Name of the weights' version; change it to ask everything again."""


class SecondGeneration(ModelFile):
    """`client_config` and `chat_config`."""

    client_config: ClientConfig
    """The endpoint."""
    chat_config: ChatConfig
    """The model and how it is asked."""


class FirstGeneration(ModelFile):
    """`provider`, `model_name` and `completions_params`."""

    provider: str = ""
    """openai, deepseek or anthropic; for another one set BASE_URL and API_KEY."""
    model_name: Text
    """Name of the model at the endpoint."""
    completions_params: Sampling = Sampling()
    """Fields of the request body."""
    base_url: BaseUrl | None = None
    """Default: the provider's, else `${BASE_URL}`."""
    api_key: KeyReference | None = None
    """Default: the provider's variable, such as `${OPENAI_API_KEY}`, else `${API_KEY}`."""


@dataclass(frozen=True)
class ModelConfig:
    """A model: what is asked of it, what it costs, where it is."""

    client_config: ClientConfig
    chat_config: ChatConfig
    prices: Prices
    supports_json_schema: bool
    revision: str | None
    mode: Literal["live", "batch"]
    batch: BatchConfig
    client_field: str
    """Prefix of the endpoint's fields in the file, for messages."""

    def request_params(self) -> dict[str, Any]:
        """The fields of every request body, all but the messages."""
        sampling = self.chat_config.model_dump(exclude={"extra_body", "stream", "stream_options"})
        given = {name: value for name, value in sampling.items() if value is not None}
        return given | self.chat_config.extra_body | self.chat_config.streaming()

    @property
    def base_url(self) -> str:
        """Of the first endpoint, as the file writes it."""
        first, *_ = places(self.client_config, self.client_field)
        return first.effective().base_url or ""

    def endpoints(
        self,
        env: Environment,
        file: str,
        *,
        root: Path = Path(),
        timeout_s: float | None = None,
        max_retries: int | None = None,
    ) -> tuple[Endpoint, ...]:
        """The endpoints in this environment; the file's timeout wins, and `max_retries` over it.

        SetupError tells what is wrong with each. A relative `ca_file` starts at `root`.
        """
        found = places(self.client_config, self.client_field)
        return Resolver(env, file, root).endpoints(found, timeout_s, max_retries)


def parse_model(data: dict[str, Any], file: str) -> tuple[ModelConfig | None, list[Problem]]:
    """The model, and every problem of its file; no model if one of them is an error."""
    known, problems, _ = take_out(data, MODEL_FIELDS, file)
    if "client_config" in data or "chat_config" in data:
        parsed, mistakes = validate(SecondGeneration, known, file)
        block, model = "chat_config", parsed and _second(parsed)
    elif "model_name" in data or "provider" in data:
        parsed, mistakes = validate(FirstGeneration, known, file)
        block, model = "completions_params", parsed and _first(parsed)
    else:
        expected = "client_config and chat_config, or provider and model_name"
        return None, [*problems, Problem(file, "", "not a model file", expected)]
    problems += [*mistakes, *_unknown_params(known.get(block), block, file)]
    if model is not None:
        problems += client_problems(model.client_config, model.client_field, file)
        problems += _batch_problems(model, block, "batch" in known, file)
    return None if errors_in(problems) else model, problems


def _second(parsed: SecondGeneration) -> ModelConfig:
    return ModelConfig(
        parsed.client_config,
        parsed.chat_config,
        parsed.prices,
        parsed.supports_json_schema,
        parsed.revision,
        parsed.mode,
        parsed.batch,
        client_field="client_config.",
    )


def _first(parsed: FirstGeneration) -> ModelConfig:
    base_url, api_key = _PROVIDERS.get(parsed.provider.lower(), _OTHER_PROVIDER)
    params = parsed.completions_params.model_dump()
    return ModelConfig(
        ClientConfig(base_url=parsed.base_url or base_url, api_key=parsed.api_key or api_key),
        ChatConfig.model_validate({**params, "model": parsed.model_name}),
        parsed.prices,
        parsed.supports_json_schema,
        parsed.revision,
        parsed.mode,
        parsed.batch,
        client_field="",
    )


def _batch_problems(
    model: ModelConfig, block: str, has_settings: bool, file: str
) -> Iterator[Problem]:
    """What does not go with batches."""
    if model.mode == "live":
        if has_settings:
            fix = "add `mode: batch`, or remove batch"
            yield Problem(file, "batch", "has no effect", fix=fix, severity="warning")
        return
    if len(places(model.client_config, model.client_field)) > 1:
        wrong = "several endpoints, but a batch stays at the one that took it"
        field = f"{model.client_field}endpoints"
        yield Problem(file, field, wrong, expected="one endpoint", fix="remove the others")
    if model.chat_config.stream:
        wrong, fix = "a batch does not stream", "remove it, or use `mode: live`"
        yield Problem(file, f"{block}.stream", wrong, fix=fix)


def _unknown_params(params: Any, block: str, file: str) -> Iterator[Problem]:
    """Keys of the request body that this program does not know."""
    if not isinstance(params, dict):
        return
    fields = ChatConfig.model_fields
    for name in cast("dict[Any, Any]", params):
        field = f"{block}.{name}"
        if name in fields:
            continue
        if name in ClientConfig.model_fields:
            yield Problem(file, field, "not a field of the request", fix="move it to client_config")
        elif close := nearest(str(name), fields, cutoff=0.8):
            yield Problem(file, field, "unknown key", fix=f"did you mean {close}?")
        else:
            yield Problem(
                file,
                field,
                "unknown key",
                fix="passed to the endpoint as it is",
                severity="warning",
            )
