"""Files of the old system that submit a distillation in pieces, or join its results: as a task for
each model, and as commands."""

from pathlib import PurePath
from typing import Any, cast

from modelcall_assets.config import Content, at
from modelcall_assets.config.catalog import JOINS, SUBMITS
from modelcall_assets.config.distillation import GENERATE
from modelcall_assets.config.migrate import Migration, leaves
from modelcall_assets.errors import Problem, SetupError

_MODELS = {SUBMITS: "batch_submit.models", JOINS: "merge.models"}
_NOW = {
    "data_split.input_file": "input_path of each task",
    "batch_submit.output_base_dir": "output_path of each task, with its model's name",
    "batch_submit.models": "a task each; conversations are sent whole, see `prompt_mode`",
    "batch_submit.concurrency": "that of each task",
    "environment.env_file": "environment.config_path",
    "merge.output_base_dir": "in the commands below",
    "merge.models": "a command each, which joins failed rows too",
}
_LEFT_OUT = {
    "data_split": "a task reads the whole file, however large",
    "batch_submit": "nothing is submitted; `--job-index` shares files among machines",
    "execution": "`modelcall plan` shows what would be asked",
    "post_processing": "the answers to one file are one file",
}


def migrate_batch(old: Content, file: str) -> Migration | None:
    """None for any other file. SetupError when it names no model."""
    if not isinstance(kind := old.get("task_type"), str) or kind not in _MODELS:
        return None
    new = Migration(old, None, {})
    for name in leaves(old):
        why = _LEFT_OUT.get(name.partition(".")[0], "it has no effect here")
        new.say("changed", name, f"now {_NOW[name]}" if name in _NOW else f"left out: {why}")
    models = cast("list[Any]", named if isinstance(named := at(old, _MODELS[kind]), list) else [])
    keys = [at(model, "config_path" if kind == SUBMITS else "name") for model in models]
    if not keys or not all(isinstance(key, str) for key in keys):
        raise SetupError([Problem(file, _MODELS[kind], "no list of models")])
    for key in cast("list[str]", keys):
        if kind == JOINS:
            new.commands.append(f"modelcall join {at(old, 'merge.output_base_dir')}/{key}")
        else:
            new.parts[f"{PurePath(key).stem}.yaml"] = _task(old, key)
    return new


def _task(old: Content, model: str) -> Content:
    """For one of the models, the whole file, or the pieces where they are cut already."""
    source, name = at(old, "data_split.input_file"), PurePath(model).stem
    if at(old, "execution.auto_split") is False:
        source = at(old, "data_split.output_dir") or str(PurePath(str(source)).with_suffix(""))
    env = at(old, "environment.env_file")
    step = {
        "response_config_path": model,
        "input_path": source,
        "output_path": f"{at(old, 'batch_submit.output_base_dir')}/{name}",
        "concurrency": at(old, "batch_submit.concurrency") or 30,
    }
    task = {"task_name": f"{old.get('task_name')}_{name}", "task_type": "data_distillation"}
    task |= {"description": old.get("description", "")}
    return {**task, GENERATE: step, **({"environment": {"config_path": env}} if env else {})}
