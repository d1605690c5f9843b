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
_DEEPER = f"nested deeper than {MOST_LEVELS} levels"
_INTEGER = "tag:yaml.org,2002:int"
_TAGS = (None, "!", *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")))
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def load_yaml(path: Path, shown: str | None = None) -> dict[str, Any]:
    """The mapping in the file. Messages call the file `shown`. SetupError for what is no such
    file, and for one beyond the limits above: a few lines of YAML can mean a billion values."""
    is_json = path.suffix == ".json"
    invalid = f"not valid {'JSON' if is_json else 'YAML'}"

    def refused(wrong: str, place: str = "", expected: str = "", fix: str = "") -> SetupError:
        file = shown or path.as_posix()
        return SetupError([Problem(file, place, wrong[:300], expected, fix=fix)])

    try:
        with path.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise refused(f"larger than {MOST_BYTES >> 20} MiB", fix="is it a data file?")
        text = content.decode("utf-8-sig")
        data: Any = _parse_json(text) if is_json else yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 at byte {error.start}"
        raise refused(wrong, fix="save it as UTF-8") from None
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise refused(_DEEPER) from None
    except json.JSONDecodeError as error:
        raise refused(f"{invalid}: {error.msg}", f"{error.lineno}:{error.colno}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise refused(f"{invalid}: {error.problem}", place) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise refused(f"{invalid}: {str(error).splitlines()[0]}") from None
    if _is_deep(data, MOST_LEVELS):
        raise refused(_DEEPER)
    if data is None:
        raise refused("the file is empty")
    if not isinstance(data, dict):
        raise refused("not a mapping", expected="`key: value` lines at the top level")
    return cast("dict[str, Any]", data)


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
                raise _marked(f"a number of {len(node.value):,} digits", mark)
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


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_int=_integer) if text.strip() else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)
