"""A YAML or JSON file as a mapping; whatever is wrong with it has a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml

from modelcall_assets.errors import Problem, SetupError

MOST_BYTES = 4 << 20
MOST_VALUES = 100_000
"""In a file, with what its aliases stand for."""
MOST_LEVELS = 100
_MOST_DIGITS = 100


def load_yaml(path: Path, shown: str | None = None) -> dict[str, Any]:
    """The mapping in the file. Messages call the file `shown`. SetupError for what is no such
    file, and for one beyond the limits above: a few lines of YAML can mean a billion values."""
    file = shown or path.as_posix()
    try:
        with path.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            wrong, fix = f"larger than {MOST_BYTES >> 20} MiB", "is it a data file?"
            raise _refused(file, wrong, fix=fix)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(file, f"not UTF-8 at byte {error.start}", fix="save it as UTF-8") from None
    except OSError as error:
        raise _refused(file, f"cannot be read: {error.strerror or error}") from None
    data = _parse_json(text, file) if path.suffix == ".json" else _parse_yaml(text, file)
    if _is_deep(data, MOST_LEVELS):
        raise _refused(file, f"nested deeper than {MOST_LEVELS} levels")
    if data is None:
        raise _refused(file, "the file is empty")
    if not isinstance(data, dict):
        raise _refused(file, "not a mapping", expected="`key: value` lines at the top level")
    return cast("dict[str, Any]", data)


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


_INTEGER = "tag:yaml.org,2002:int"
_TAGS = (None, "!", *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")))


class _Loader(yaml.SafeLoader):
    """The safe loader, except that keys are text and stand only once in a mapping, that no tag
    changes what a value is, and that aliases stand for no more than `MOST_VALUES`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values: dict[yaml.Node, int] = {}
        """Of each node that is complete, those in it and itself."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = cast("Any", self.peek_event())  # pyright: ignore[reportUnknownMemberType]
        is_alias, mark = type(event) is yaml.AliasEvent, event.start_mark
        if not is_alias and event.tag not in _TAGS:
            raise _marked(f"the tag {event.tag!r} has no meaning here", mark)
        node = super().compose_node(parent, index)
        if is_alias and node not in self._values:
            raise _marked(f"*{event.anchor} stands in what it stands for", mark)
        if node is not None and node not in self._values:
            if node.tag == _INTEGER and len(node.value) > _MOST_DIGITS:
                raise _marked(_long_number(node.value), mark)
            self._values[node] = count = 1 + sum(map(self._values.__getitem__, _inner(node)))
            if count > MOST_VALUES:
                many = f"more than {MOST_VALUES:,} values, with what its aliases stand for"
                raise _marked(many, mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "[…]"
            if key.tag not in _KEY_TAGS:
                raise _marked(f"write the key {name!r} in quotes", key.start_mark)
            if name in seen:
                raise _marked(f"duplicate key {name!r}", key.start_mark)
            seen.add(name)
        return node


def _marked(wrong: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, wrong, mark)


def _inner(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (part for pair in node.value for part in pair)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _is_deep(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    held = cast("dict[str, Any] | list[Any]", value)
    inner = held.values() if isinstance(held, dict) else held
    return not levels or any(_is_deep(each, levels - 1) for each in inner)


def _parse_yaml(text: str, file: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise _refused(file, f"not valid YAML: {error.problem}", place=place) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _refused(file, f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise _refused(file, f"nested deeper than {MOST_LEVELS} levels") from None


def _parse_json(text: str, file: str) -> Any:
    try:
        if not text.strip():
            return None
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except json.JSONDecodeError as error:
        place = f"{error.lineno}:{error.colno}"
        raise _refused(file, f"not valid JSON: {error.msg}", place=place) from None
    except ValueError as error:
        raise _refused(file, f"not valid JSON: {error}") from None
    except RecursionError:
        raise _refused(file, f"nested deeper than {MOST_LEVELS} levels") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(_long_number(digits))
    return int(digits)


def _long_number(digits: str) -> str:
    return f"a number of {len(digits):,} digits"


def _refused(
    file: str, wrong: str, *, place: str = "", expected: str = "", fix: str = ""
) -> SetupError:
    return SetupError([Problem(file, place, wrong[:300], expected, fix=fix)])
