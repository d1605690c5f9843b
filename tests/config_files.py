"""Config files as tests build them: the smallest task, model and prompt, and their mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import Ended, Project

from modelcall_assets.config.catalog import load_task
from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.errors import Problem, SetupError

Data = dict[str, Any]
Messages = Callable[[Mapping[str, object]], None]
"""What the fixture `messages` is."""

MODEL_PATH, PROMPT_PATH = "configs/models/m.yaml", "configs/prompts/p.yaml"
MODEL: Data = {
    "client_config": {"base_url": "http://localhost:8000/v1", "api_key": "EMPTY"},
    "chat_config": {"model": "m"},
}
PROMPT: Data = {
    "prompt_template": {"prompt_text": "Rate {text}"},
    "output_config": {"require_json": True, "json_keys": ["score"]},
}


def with_fields(data: Data, changes: Data) -> Data:
    """A copy in which each field has its new value, or is not there for `...`; `__` is a dot."""
    copy: Data = yaml.safe_load(yaml.safe_dump(data))
    for field, value in changes.items():
        *blocks, name = field.replace("__", ".").split(".")
        block = copy
        for part in blocks:
            block = block.setdefault(part, {})
        if value is ...:
            del block[name]
        else:
            block[name] = value
    return copy


def told(problems: Sequence[Problem]) -> str | list[str]:
    """Their messages, of one the only one."""
    lines = [f"{each.severity}: {each}".removeprefix("error: ") for each in problems]
    return lines[0] if len(lines) == 1 else lines


def task_data(source: str = "./in", target: str = "./out", name: str = "demo", **more: Any) -> Data:
    data: Data = {
        "task_name": name,
        "data": {"input_folder": source, "output_folder": target},
        "model": {"config_path": MODEL_PATH},
        "prompt": {"config_path": PROMPT_PATH},
    }
    return with_fields(data, more)


def write(path: Path, content: Data | str) -> Path:
    """Text as it is; else JSON or YAML by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_json = path.suffix == ".json"
    dumped = json.dumps(content) if is_json else yaml.safe_dump(content, allow_unicode=True)
    text = content if isinstance(content, str) else dumped
    path.write_text(text, "utf-8")
    return path


@dataclass
class Configs:
    """A project of config files with one model and one prompt."""

    root: Path

    def __post_init__(self) -> None:
        self.model()
        self.write(PROMPT_PATH, PROMPT)

    def write(self, file: str, content: Data | str) -> Path:
        return write(self.root / file, content)

    def model(self, **changes: Any) -> Path:
        return self.write(MODEL_PATH, with_fields(MODEL, changes))

    def task(self, *places: str, file: str = "", name: str = "demo", **more: Any) -> Path:
        """Input and output folder, and other fields."""
        content = task_data(*places, name=name, **more)
        return self.write(f"configs/tasks/{file or name}.yaml", content)

    def load(self, *places: str, **more: Any) -> TaskSpec:
        return load_task(self.task(*places, **more), self.root)

    def problems(self, *places: str, **more: Any) -> dict[str, Problem]:
        """By file and field."""
        with pytest.raises(SetupError) as caught:
            self.load(*places, **more)
        return {f"{each.file}:{each.field}": each for each in caught.value.problems}

    def check(self, *arguments: str | Path) -> Ended:
        return Project(self.root).run("check", *arguments)
