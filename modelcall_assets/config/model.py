"""A model file of either generation, as one ModelConfig."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from modelcall_assets.config import (
    Block,
    Content,
    Limit,
    OldField,
    Parsed,
    Text,
    block_at,
    errors_in,
    mistake,
    must,
    take_out,
    validate,
)
from modelcall_assets.config.endpoint import (
    BaseUrl,
    ClientConfig,
    KeyReference,
    client_problems,
)
from modelcall_assets.errors import Problem, nearest

_PROVIDERS = {
    "openai": ("https://api.openai.com/v1", "${OPENAI_API_KEY}"),
    "deepseek": ("https://api.deepseek.com/v1", "${DEEPSEEK_API_KEY}"),
    "anthropic": ("https://api.anthropic.com/v1", "${ANTHROPIC_API_KEY}"),
}
_TIMEOUT = "client_config.timeout is the limit of a request"
MODEL_FIELDS = (
    OldField("warning", "chat_config.timeout", _TIMEOUT),
    OldField("warning", "completions_params.timeout", _TIMEOUT),
    OldField("changed", "model_name", "was ignored in favour of an environment variable"),
)
_ONE = must(lambda n: n == 1, "a record has one answer", "1", "remove n")


def _extra_body(body: dict[str, Any]) -> dict[str, Any]:
    own = ("messages", "model", "n", "stream", "stream_options")
    if taken := [name for name in own if name in body]:
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
    n: Annotated[int, _ONE] | None = None
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
    extra_body: Annotated[dict[str, Any], AfterValidator(_extra_body)] = Field(default={})
    """More fields, merged into the request body."""


class ChatConfig(Sampling):
    """The model and how it is asked."""

    model: Text
    """Name of the model at the endpoint."""


TokenPrices = tuple[float | None, float | None, float | None]
"""US dollars per million input, output and cached input tokens."""


class Prices(Block):
    """What tokens cost; unknown means that the cost is unknown, never 0."""

    usd_per_million_input_tokens: Annotated[float, Field(ge=0)] | None = None
    """US dollars for a million prompt tokens."""
    usd_per_million_output_tokens: Annotated[float, Field(ge=0)] | None = None
    """US dollars for a million completion tokens."""

    usd_per_million_cached_input_tokens: Annotated[float, Field(ge=0)] | None = None
    """US dollars for a million prompt tokens that the endpoint had in its cache; default: as all
    others."""
    batch_discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share that is taken off in `mode: batch`: 0.5 is half the price."""


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

    old_fields = MODEL_FIELDS

    mode: Literal["live", "batch"] = "live"
    """`batch` sends files of requests to OpenAI's Batch API: cheaper, within a day."""
    batch: BatchConfig = BatchConfig()
    prices: Prices = Prices()
    supports_json_schema: bool = False
    """Whether the endpoint takes `response_format: json_schema`."""
    revision: str | None = None
    """Name of the weights' version; change it to ask everything again."""


class ModelConfig(ModelFile):
    """`client_config` and `chat_config`."""

    client_config: ClientConfig
    """The endpoint."""
    chat_config: ChatConfig
    """The model and how it is asked."""

    client_field: ClassVar[str] = "client_config."
    """Prefix of the endpoint's fields in the file, for messages."""

    @property
    def token_prices(self) -> TokenPrices:
        """As the mode has them; the cached ones cost as all others where nobody says otherwise."""
        prices, share = self.prices, 1 - self.prices.batch_discount * (self.mode == "batch")
        each = prices.usd_per_million_input_tokens, prices.usd_per_million_output_tokens
        cached = prices.usd_per_million_cached_input_tokens
        read, written = (None if price is None else price * share for price in each)
        return read, written, read if cached is None else cached * share

    def request_params(self) -> dict[str, Any]:
        """The fields of every request body, all but the messages."""
        chat = self.chat_config
        sampling = chat.model_dump(exclude={"extra_body", "stream", "stream_options"})
        given = {name: value for name, value in sampling.items() if value is not None}
        given |= chat.extra_body
        if chat.stream:
            options = chat.stream_options
            options = {"include_usage": True} if options is None else options
            given |= {"stream": True, **({"stream_options": options} if options else {})}
        return given


class FirstGeneration(ModelFile):
    """`provider`, `model_name` and `completions_params`."""

    provider: str = ""
    """openai, deepseek or anthropic; for another one set BASE_URL and API_KEY."""
    model_name: Text
    """Name of the model at the endpoint."""
    completions_params: Sampling = Sampling()
    base_url: BaseUrl | None = None
    """Default: the provider's, else `${BASE_URL}`."""
    api_key: KeyReference | None = None
    """Default: the provider's variable, such as `${OPENAI_API_KEY}`, else `${API_KEY}`."""

    def as_model(self) -> ModelConfig:
        usual = _PROVIDERS.get(self.provider.lower(), ("${BASE_URL}", "${API_KEY}"))
        base_url, api_key = self.base_url or usual[0], self.api_key or usual[1]
        params = self.completions_params.model_dump()
        return _OfFirstGeneration(
            client_config=ClientConfig(base_url=base_url, api_key=api_key),
            chat_config=ChatConfig.model_validate({**params, "model": self.model_name}),
            **{name: getattr(self, name) for name in ModelFile.model_fields},
        )


class _OfFirstGeneration(ModelConfig):
    client_field: ClassVar[str] = ""


def parse_model(data: Content, file: str) -> Parsed[ModelConfig]:
    if "client_config" in data or "chat_config" in data:
        parsed, problems = validate(ModelConfig, data, file)
        block, model = "chat_config", parsed
    elif "model_name" in data or "provider" in data:
        parsed, problems = validate(FirstGeneration, data, file)
        block, model = "completions_params", parsed and parsed.as_model()
    else:
        expected = "client_config and chat_config, or provider and model_name"
        return None, [Problem(file, "", "not a model file", expected)]
    known, _ = take_out(data, MODEL_FIELDS)
    problems += _unknown_params(block_at(known, block), block, file)
    if model is not None:
        problems += client_problems(model.client_config, model.client_field, file)
        problems += _batch_problems(model, block, "batch" in data, file)
    return None if errors_in(problems) else model, problems


def _batch_problems(
    model: ModelConfig, block: str, has_settings: bool, file: str
) -> Iterator[Problem]:
    if model.mode == "live":
        if has_settings:
            fix = "add `mode: batch`, or remove batch"
            yield Problem(file, "batch", "has no effect", fix=fix, severity="warning")
        return
    if len(model.client_config.endpoints or ()) > 1:
        wrong = "several endpoints, but a batch stays at the one that took it"
        field = f"{model.client_field}endpoints"
        yield Problem(file, field, wrong, expected="one endpoint", fix="remove the others")
    if model.chat_config.stream:
        wrong, fix = "a batch does not stream", "remove it, or use `mode: live`"
        yield Problem(file, f"{block}.stream", wrong, fix=fix)


def _unknown_params(params: Content, block: str, file: str) -> Iterator[Problem]:
    fields = ChatConfig.model_fields
    for name in (name for name in params if name not in fields):
        field, wrong = f"{block}.{name}", "unknown key"
        if name in ClientConfig.model_fields:
            yield Problem(file, field, "not a field of the request", fix="move it to client_config")
        elif close := nearest(name, fields, cutoff=0.8):
            yield Problem(file, field, wrong, fix=f"did you mean {close}?")
        else:
            fix = "passed to the endpoint as it is"
            yield Problem(file, field, wrong, fix=fix, severity="warning")
