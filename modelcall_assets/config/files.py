"""Files of a project as they are read: YAML and JSON, with the lines of their fields, and env
files, with the references to their variables.

Nothing is written to `os.environ`, so what one task loads no other task sees.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import yaml
from dotenv import dotenv_values
from pydantic_core import PydanticCustomError

from modelcall_assets.config import Content, problem_of
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import REFERENCE

MOST_BYTES = 4 << 20
MOST_VALUES = 100_000
"""In a file, with what its aliases stand for."""
MOST_LEVELS = 100
_MOST_DIGITS = 100
_DEEPER = f"nested deeper than {MOST_LEVELS} levels"
_TAGS = (None, "!", *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")))
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
Check = Callable[[str], str]
"""Passes a text on, perhaps in its simplest spelling; or a mistake."""


def load_yaml(path: Path, shown: str | None = None) -> Content:
    """The mapping in the file. Messages call the file `shown`. SetupError for what is no such
    file, and for one beyond the limits above: a few lines of YAML can mean a billion values."""
    is_json = path.suffix == ".json"
    invalid = f"not valid {'JSON' if is_json else 'YAML'}"

    def refused(wrong: str, place: str = "", expected: str = "", fix: str = "") -> SetupError:
        problem = Problem(shown or path.as_posix(), place, wrong[:300], expected, fix=fix)
        return SetupError([problem])

    try:
        with path.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise refused(f"larger than {MOST_BYTES >> 20} MiB", fix="is it a data file?")
        text = content.decode("utf-8-sig")
        data: Any = yaml.load(text, _Loader) if not is_json else None
        if is_json and text.strip():
            data = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise refused(f"not UTF-8 at byte {error.start}", fix="save it as UTF-8") from None
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
    return cast("Content", data)


def written_name(path: Path) -> str:
    """What a task file calls its task, or is called itself where it does not say."""
    with suppress(SetupError):
        name = load_yaml(path).get("task_name")
        if isinstance(name, str) and name:
            return name
    return path.stem


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
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MOST_DIGITS:
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


def with_lines(problems: Iterable[Problem], root: Path) -> Iterator[Problem]:
    """Each with the line of its field, or of what of that is there. The files are below `root` or
    absolute."""
    contents: dict[str, yaml.Node | None] = {}
    for problem in problems:
        if problem.field and problem.file not in contents:
            contents[problem.file] = None
            with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
                text = (root / problem.file).read_text("utf-8-sig")
                if problem.file.endswith(".json"):
                    text = text.replace("\t", " ")
                contents[problem.file] = yaml.SafeLoader(text).get_single_node()
        mark = mark_of(contents.get(problem.file), problem.field)
        yield replace(problem, line=mark and mark.line + 1)


def mark_of(node: yaml.Node | None, field: str) -> yaml.Mark | None:
    """Where in a file's nodes a field begins, or what of it is there."""
    inner: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        inner = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(f"[{at}]", each, each) for at, each in enumerate(node.value)]
    for name, begins, value in sorted(inner, key=lambda each: -len(each[0])):
        rest = field.removeprefix(name)
        if rest != field and rest[:1] in ("", ".", "["):
            return mark_of(value, rest.removeprefix(".")) or begins.start_mark
    return None


class MissingVariable(KeyError):
    """`${NAME}` names a variable that no file and no process sets."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class Environment(dict[str, str]):
    """Variables, which nobody changes; the repr shows names, never values."""

    @classmethod
    def for_task(cls, root: Path, env_files: Sequence[Path] = ()) -> Self:
        """Task env files (the last wins) > process environment > `<root>/.env`."""
        project = root / ".env"
        values = (read_env_file(project) if project.is_file() else {}) | dict(os.environ)
        for path in env_files:
            values |= read_env_file(path)
        return cls(values)

    def expand(self, text: str) -> str:
        """Replaces `${NAME}` and `${NAME:-default}`; all other text stays as it is."""
        return REFERENCE.sub(self._value, text)

    def _value(self, match: re.Match[str]) -> str:
        name, has_default, default = match[1].partition(":-")
        if has_default:
            return self.get(name) or default
        if name not in self:
            raise MissingVariable(name)
        return self[name]

    def __repr__(self) -> str:
        return f"Environment({sorted(self)})"


def read_env_file(path: Path) -> dict[str, str]:
    """`KEY=VALUE` lines, with optional `export`, quotes and comments; values are not expanded."""
    try:
        values = dotenv_values(path, interpolate=False, encoding="utf-8")
        return {name: value for name, value in values.items() if value is not None}
    except UnicodeDecodeError:
        wrong = "not UTF-8"
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    raise SetupError([Problem(path.as_posix(), "", wrong)])


@dataclass
class Expander:
    """Replaces references in fields of one file; what is wrong goes to `problems`."""

    env: Environment
    file: str
    problems: list[Problem] = field(default_factory=list[Problem], kw_only=True)

    def text(self, place: str, text: str | None, check: Check = str) -> str | None:
        """The text with its references replaced, if it passes."""
        if text is None:
            return None
        try:
            if value := self.env.expand(text):
                return check(value)
            self.unready(place, f"{text} is empty", f"{text} has a value")
        except MissingVariable as error:
            self.unready(place, f"variable {error.name} is not set", f"{text} has a value")
        except PydanticCustomError as error:
            self.problems.append(problem_of(error, self.file, place, text))
        return None

    def unready(self, place: str, wrong: str, needed: str, more: str = "") -> None:
        """The file is right, but the environment lacks what it refers to."""
        where = "in .env, in the task's env file or in the process"
        fix = f"the task cannot run until {needed} {where}{more}"
        self.problems.append(Problem(self.file, place, wrong, fix=fix, unready=True))
