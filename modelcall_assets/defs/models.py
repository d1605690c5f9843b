"""Model files as Dagster's resources: the UI lists them with the assets that use them. They hold
what a file says of the model, its endpoints and limits, and never a key."""

from collections.abc import Sequence
from pathlib import PurePath

import dagster as dg

from modelcall_assets.config.catalog import legal_key
from modelcall_assets.config.endpoint import EndpointConfig
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.task import Task

_LIMITS = ("max_in_flight", "requests_per_minute", "tokens_per_minute")


class Model(dg.ConfigurableResource):
    """The model of a file in `configs/models/`: where it is asked, within which limits, at which
    prices. Its requests go through the task's own engine."""

    file: str
    model: str
    endpoints: list[str]
    prices: dict[str, float]


def model_keys(stage: Stage) -> set[str]:
    """The resource that a stage uses, if it asks a model."""
    if not isinstance(stage, AskingStage):
        return set()
    return {legal_key(f"model_{PurePath(stage.spec.files[stage.model_in]).stem}")}


def model_resources(tasks: Sequence[Task]) -> dict[str, Model]:
    """Those of all stages, by key."""
    return {
        key: _resource(stage)
        for task in tasks
        for stage in task.stages
        if isinstance(stage, AskingStage)
        for key in model_keys(stage)
    }


def _resource(stage: AskingStage) -> Model:
    model = stage.model
    prices = model.prices.model_dump(exclude_none=True)
    endpoints = [_told(each) for each, _, _ in model.client_config.each("")]
    name = str(model.chat_config.model)
    file = stage.spec.files[stage.model_in]
    return Model(file=file, model=name, endpoints=endpoints, prices=prices)


def _told(endpoint: EndpointConfig) -> str:
    limits = (f"{name} {value}" for name in _LIMITS if (value := getattr(endpoint, name)))
    return ", ".join((endpoint.base_url or "", *limits))
