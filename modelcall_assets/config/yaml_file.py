"""A YAML or JSON file as a mapping; whatever is wrong with it has a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import yaml

from modelcall_assets.errors import Problem, SetupError


def load_yaml(path: Path, shown: str | None = None) -> dict[str, Any]:
    """The mapping in the file. Messages call the file `shown`."""
    file = shown or path.as_posix()
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(file, f"not UTF-8 at byte {error.start}", fix="save it as UTF-8") from None
    except OSError as error:
        raise _refused(file, f"cannot be read: {error.strerror or error}") from None
    data = _parse_json(text, file) if path.suffix == ".json" else _parse_yaml(text, file)
    if data is None:
        raise _refused(file, "the file is empty")
    if not isinstance(data, dict):
        raise _refused(file, "not a mapping", expected="`key: value` lines at the top level")
    return cast("dict[str, Any]", data)


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """The safe loader, except that keys are text and stand only once in a mapping."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "[…]"
            mark = key.start_mark
            if key.tag not in _KEY_TAGS:
                raise yaml.MarkedYAMLError(None, None, f"write the key {name!r} in quotes", mark)
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"duplicate key {name!r}", mark)
            seen.add(name)
        return node


def _parse_yaml(text: str, file: str) -> Any:
    try:
        data = yaml.load(text, _Loader)
        json.dumps(data, default=str, skipkeys=True)  # refuses an alias that holds itself
        return data
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise _refused(file, f"not valid YAML: {error.problem}", place=place) from None
    except (yaml.YAMLError, ValueError) as error:
        raise _refused(file, f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise _refused(file, "not valid YAML: nested too deeply") from None


def _parse_json(text: str, file: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique) if text.strip() else None
    except json.JSONDecodeError as error:
        place = f"{error.lineno}:{error.colno}"
        raise _refused(file, f"not valid JSON: {error.msg}", place=place) from None
    except (ValueError, RecursionError) as error:
        raise _refused(file, f"not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _refused(
    file: str, wrong: str, *, place: str = "", expected: str = "", fix: str = ""
) -> SetupError:
    return SetupError([Problem(file, place, wrong, expected, fix=fix)])
