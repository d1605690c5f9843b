"""A file of the old system as one of this project, and what became of each of its fields."""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal, cast, get_args

from pydantic.fields import FieldInfo

from modelcall_assets.config import (
    Block,
    Content,
    OldField,
    Parse,
    at,
    block_at,
    is_old,
    shown_value,
    take_out,
    validate,
)
from modelcall_assets.config.catalog import parse_task
from modelcall_assets.config.datasets import (
    MergeGroupsFile,
    are_datasets,
    parse_datasets,
    parse_merge_groups,
)
from modelcall_assets.config.distillation import (
    GENERATE,
    OLD_BLOCK,
    OLD_STEPS,
    STEP_FIELDS,
    DistillationTask,
    in_old_block,
    old_step,
)
from modelcall_assets.config.endpoint import ClientConfig, holds_literal_secret
from modelcall_assets.config.model import MODEL_FIELDS, parse_model
from modelcall_assets.config.places import FOLDERS, PLACEHOLDERS, STORAGE_FILE, was_in_object_store
from modelcall_assets.config.prompt import OutputConfig, PromptConfig, is_number, parse_prompt
from modelcall_assets.config.steps import ChatmlStep, MergeStep, ResponsesStep
from modelcall_assets.config.task import (
    DISTILLATION_TYPES,
    TASK_FIELDS,
    TASK_TYPE,
    ScoringTask,
    TaskFile,
)
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import NO_KEY, is_reference, looks_secret, names_secret

Treatment = Literal["honoured", "changed", "refused"]
TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)

_MODEL_KEYS = {"client_config", "chat_config", "provider", "model_name", "completions_params"}
_FIRST = ("task_name", "task_type", "description", "owners")
_PLACEHOLDER = re.compile(rf"\{{({'|'.join(PLACEHOLDERS)})\}}")
_OWNER = re.compile(r"\b(openai|deepseek|anthropic)\.com(?=[:/]|$)", re.I)
_REPLACED = [("client_config", name) for name in ("api_key", "base_url", "headers", "proxy")]
"""Where `${NAME}` is replaced."""


@dataclass
class Migration:
    """The new file: its data, none if it cannot be written; hints become comments at a field. Or
    the `parts` of a batch, files by their names, and the commands that take its place."""

    old: Content
    data: Content | None
    lines: dict[str, tuple[Treatment, str]]
    hints: dict[str, str] = field(default_factory=dict[str, str])
    parts: dict[str, Content] = field(default_factory=dict[str, Content])
    commands: list[str] = field(default_factory=list[str])

    def say(self, treatment: Treatment, name: str, reason: str) -> None:
        """Adds to the one line of a field; the gravest treatment stands."""
        before, why = self.lines.get(name, (treatment, ""))
        gravest = max(map(TREATMENTS.index, (treatment, before)))
        self.lines[name] = TREATMENTS[gravest], "; ".join(filter(None, (why, reason)))

    def of(self, treatment: Treatment) -> dict[str, str]:
        return {name: why for name, (each, why) in self.lines.items() if each == treatment}


def migrate_file(old: Content, file: str) -> Migration:
    """The file in this project's form. Secrets are in neither the data nor the lines."""
    data, keys = deepcopy(old), old.keys()
    parse: Parse = parse_task
    new = Migration(old, data, dict.fromkeys(leaves(old), ("honoured", "")))
    if keys & _MODEL_KEYS:
        parse, data = parse_model, _without_secrets(_model(data, new), (), _stem(file), new)
    elif keys & PromptConfig.model_fields.keys():
        parse, data = parse_prompt, _prompt(data, new)
    elif keys & MergeGroupsFile.model_fields.keys():
        parse = parse_merge_groups
    elif are_datasets(data):
        parse = parse_datasets
    elif not keys & {OLD_BLOCK, *ScoringTask.model_fields, *DistillationTask.model_fields}:
        wrong = "not a task, model, prompt, data set or merge group file of the old system"
        raise SetupError([Problem(file, "", wrong)])
    elif (kind := old.get("task_type", TASK_TYPE)) in (TASK_TYPE, *DISTILLATION_TYPES):
        data = _without_secrets(data, (), _stem(file), new)
        data = _task(data, new) if kind == TASK_TYPE else _distillation(data, new)
    else:
        new.data, new.lines = None, {}
    found = parse(data, file)[1]
    if new.data is None:
        found = [problem for problem in found if problem.field == "task_type"]
    else:
        new.data = data
    for problem in found:
        error = problem.severity == "error" and not problem.unready
        reason = str(replace(problem, file="", field="")).removeprefix(": ")
        new.say("refused" if error else "honoured", problem.field or "the file", reason)
    return new


def leaves(data: Content, prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        below = cast("Content", value) if isinstance(value, dict) else {}
        yield from leaves(below, f"{prefix}{name}.") if below else [f"{prefix}{name}"]


def _leave_out(
    data: Content, old_fields: Sequence[OldField], new: Migration
) -> tuple[Content, bool]:
    """The data without the fields that do nothing here, and whether it is of the old system."""
    kept, found = take_out(data, old_fields)
    for old, value in found:
        shown = shown_value(value, old.path)
        if old.treatment in ("honoured", "changed"):
            new.say(old.treatment, old.path, old.instead)
        elif value in old.harmless and not old.stays(value):
            new.say("changed", old.path, f"left out: {shown} is what happens anyway")
        elif old.treatment == "refused":
            new.say("refused", old.path, f"{shown} is left out: {old.instead}")
        elif not old.stays(value):
            new.say("changed", old.path, f"left out: {old.instead}")
    emptied = [name for name, value in kept.items() if value == {} and data[name]]
    return {name: kept[name] for name in kept if name not in emptied}, is_old(data, old_fields)


# Tasks


def _task(data: Content, new: Migration) -> Content:
    data, of_old = _leave_out(data, TASK_FIELDS, new)
    preprocess, debug = block_at(data, "preprocess"), block_at(data, "debug")
    for name in ("max_files", "max_items_per_file"):
        if of_old and debug.get(name) == -1:
            new.say("changed", f"debug.{name}", "it left out the last one")
    for place in FOLDERS:
        _move(data, place, of_old, new)
    if type(files := preprocess.get("num_files")) is int and files <= 0 and files != -1:
        preprocess["num_files"] = -1
        new.say("changed", "preprocess.num_files", "now -1: no limit")
    universal = preprocess.get("script_type", "universal") == "universal"
    if of_old and universal and preprocess.get("enabled") and "file_pattern" not in preprocess:
        preprocess["file_pattern"] = "*.parquet"
        new.say("changed", "preprocess.file_pattern", "added: *.parquet was the default, * is now")
    return _ordered(data, ScoringTask)


def _move(data: Content, place: str, of_old: bool, new: Migration) -> None:
    """A folder without placeholders; what a relative one means now."""
    if not isinstance(text := at(data, place), str):
        return
    parent, _, name = place.partition(".")
    bare = ((part, _PLACEHOLDER.sub("", part)) for part in text.split("/"))
    parts = (part if part == rest else rest.strip("_-. ") or None for part, rest in bare)
    data[parent][name] = moved = "/".join(part for part in parts if part is not None)
    for placeholder in dict.fromkeys(_PLACEHOLDER.findall(text)):
        reason = f"{{{placeholder}}} removed, now {moved or 'empty'}: a partition has one place"
        new.say("changed", place, f"{reason}; {PLACEHOLDERS[placeholder]}")
    if of_old and was_in_object_store(text):
        reason = f"kept: was tos://agi-data/{text}, is now {moved} below the project root, or below"
        new.say("changed", place, f"{reason} the data_root of {STORAGE_FILE}")


def in_file_order(block: type[Block]) -> dict[str, FieldInfo]:
    """The fields as files and pages have them: of a task what it is, what it does, and then how."""
    fields = block.model_fields
    shared = TaskFile.model_fields if issubclass(block, TaskFile) else {}
    own = [name for name in fields if name not in shared and name not in _FIRST]
    first = [name for name in _FIRST if name in fields] if shared else []
    return {name: fields[name] for name in dict.fromkeys((*first, *own, *fields))}


def _ordered(data: Content, block: type[Block]) -> Content:
    """The mapping in the order of the documentation; unknown keys come last."""
    fields = in_file_order(block)
    result = {name: data[name] for name in fields if name in data} | data
    for name in fields.keys() & data.keys():
        inner = fields[name].annotation
        if isinstance(inner, type) and issubclass(inner, Block) and isinstance(data[name], dict):
            result[name] = _ordered(cast("Content", data[name]), inner)
    return result


def _distillation(data: Content, new: Migration) -> Content:
    """The one step of an old file stays as it is written there."""
    step = old_step(data)
    steps = ((old, *in_old_block(old)) for old in STEP_FIELDS)
    of_step = [
        replace(old, path=f"{OLD_BLOCK}.{name}")
        for old, of, names in steps
        for name in (names if of == step else ())
    ]
    data, of_old = _leave_out(data, (*TASK_FIELDS, *of_step), new)
    block = block_at(data, OLD_BLOCK)
    for kind in (ChatmlStep, MergeStep, ResponsesStep):
        for name in (kind.input_field, kind.output_field):
            _move(data, f"{OLD_BLOCK}.{name}", False, new)
    if step == GENERATE and block:
        reason = "conversations are sent whole; the old system sent their first message alone, as "
        reason += "`prompt_mode: first_message` does"
        new.say("changed", f"{OLD_BLOCK}.input_path", reason)
    if of_old and data["task_type"] == GENERATE and block and "concurrency" not in block:
        block["concurrency"] = 30
        new.say("changed", f"{OLD_BLOCK}.concurrency", "added: 30 was the default, 20 is now")
    if step not in OLD_STEPS or step in data:
        return _ordered(data, DistillationTask)
    by_step = {step if name == OLD_BLOCK else name: value for name, value in data.items()}
    ordered = _ordered(by_step, DistillationTask)
    return {OLD_BLOCK if name == step else name: value for name, value in ordered.items()}


# Models


def _model(data: Content, new: Migration) -> Content:
    data, _ = _leave_out(data, MODEL_FIELDS, new)
    if "client_config" not in data and "chat_config" not in data:
        data = _second_generation(data, new)
    retries = block_at(data, "client_config").get("max_retries")
    if type(retries) is int:
        reason = f"a request is sent {retries + 1} times at most; it was three rounds of that"
        new.say("changed", "client_config.max_retries", reason)
    return data


def _second_generation(data: Content, new: Migration) -> Content:
    """`provider`, `model_name` and `completions_params` as `client_config` and `chat_config`."""
    provider = str(data.pop("provider", None) or "")
    known, _ = parse_model({"provider": provider, "model_name": "any"}, "")
    assert known is not None
    client: Content = known.client_config.model_dump(include={"base_url", "api_key"})
    new.say("changed", "provider", "now client_config: {base_url} with {api_key}".format(**client))
    params = block_at(data, "completions_params")
    chat: Content = {"model": data.pop("model_name", None), **params}
    for name in (name for name in data if name in ClientConfig.model_fields):
        client[name] = client.get(name) if data[name] is None else data[name]
        new.say("changed", name, f"now client_config.{name}")
    others = ((name, value) for name, value in data.items() if name not in client)
    rest = {name: value for name, value in others if value not in (None, params)}
    new.say("changed", "model_name", "now chat_config.model")
    for name in leaves(params):
        new.say("changed", f"completions_params.{name}", f"now chat_config.{name}")
    return {"client_config": client, "chat_config": chat, **rest}


# Secrets


def _stem(file: str) -> str:
    """The file's name as the start of a variable's name."""
    stem = _name(PurePath(file).stem).strip("_")
    return stem if stem[:1].isalpha() else f"MODEL_{stem}".rstrip("_")


def _name(text: str) -> str:
    return re.sub(r"[^A-Z0-9]+", "_", text.upper())


def _without_secrets(value: Any, path: tuple[str, ...], stem: str, new: Migration) -> Any:
    """The value with `${NAME}` in place of every key and password."""
    if isinstance(value, dict):
        fields = cast("Content", value)
        owner = _OWNER.search(str(fields.get("base_url")))
        stem = owner[1].upper() if owner else stem
        return {key: _without_secrets(v, (*path, key), stem, new) for key, v in fields.items()}
    if isinstance(value, list):
        return [_without_secrets(item, path, stem, new) for item in cast("list[Any]", value)]
    if not _is_secret(value, path):
        return value
    name = f"{stem}_{_name(path[-1])}"
    if path[:2] in _REPLACED:
        new.say("changed", ".".join(path), f"now ${{{name}}}: put {name}=<the old value> in .env")
    else:
        new.say("refused", ".".join(path), "a secret, taken out: no variable is replaced here")
    return f"${{{name}}}"


def _is_secret(value: Any, path: tuple[str, ...]) -> bool:
    if value is None or isinstance(value, bool):
        return False
    text = str(value)
    if path[:2] == ("client_config", "headers"):
        return holds_literal_secret(path[-1], text)
    is_open = text in NO_KEY or is_reference(text, ("", *NO_KEY))
    return (any(map(names_secret, path)) and not is_open) or looks_secret(text)


# Prompts


def _prompt(data: Content, new: Migration) -> Content:
    """With `json_schema` from the defaults' types; only defaults that can have an effect stay."""
    block = block_at(data, "output_config")
    output, _ = validate(OutputConfig, block, "")
    if output is None or "json_schema" in block or not output.json_default_values:
        return data
    place = "output_config.json_schema"
    properties: Content = {}
    kept: Content = {}
    for key, value in block.pop("json_default_values").items():
        is_key, is_rating = key in output.keys, is_number(value)
        if is_key and value is not None:
            properties[key] = {"type": "integer"} if type(value) is int else output.fields[key]
        if is_key and is_rating:
            new.hints[f"{place}.properties.{key}"] = "add the scale: minimum and maximum"
        if is_key and key in output.optional_defaults:
            kept[key] = value
            continue
        why = "a default never becomes a score" if is_rating else f"{key} is required"
        why = why if is_key else f"{key} is not in json_keys"
        new.say("changed", f"output_config.json_default_values.{key}", f"left out: {why}")
    if properties:
        block["json_schema"] = {"properties": properties}
        new.say("changed", place, "added: types, as the defaults show them; ranges are for you")
    if kept:
        block["json_default_values"] = kept
    return data
