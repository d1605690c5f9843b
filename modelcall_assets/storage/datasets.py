"""Data set folders as Hugging Face lays them out: the files of each split of each configuration.

Configurations come from the front matter of README.md, else they are sub-folders. Splits come from
there, from `save_to_disk`, or from names: `data/<split>-00000-of-00001.…`, else folders, else files
called train, validation or test, else all files are train. Nothing of a folder is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import orjson
import yaml

from modelcall_assets.errors import InputError
from modelcall_assets.records import LINE_SUFFIXES, is_data_file, unpacked_name
from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.listing import FileInfo, list_files, stat_file
from modelcall_assets.storage.places import Place

Files = dict[str, list[FileInfo]]

_FORMATS = ((".parquet",), LINE_SUFFIXES, (".arrow", ".feather"))
"""Files of one make a split: of that with the most files, of the first where two have as many."""
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
_NAMED = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)")
    for split, words in (
        ("train", "train|training"),
        ("validation", "validation|valid|dev|val"),
        ("test", "test|testing|eval|evaluation"),
    )
}
_NO_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What PyYAML raises, the others for values that are not what their tags say."""
_READABLE = (
    "Parquet, JSONL (.jsonl, .ndjson, .json, also as .gz or .zst) and Arrow files can be read"
)


@dataclass(frozen=True, slots=True)
class Split:
    """The files of a split in reading order; `config` as it was asked for, None for the default."""

    config: str | None
    split: str
    files: tuple[FileInfo, ...]


def dataset_path(input_dir: Place, key: str) -> Place:
    """`<input_dir>/<key>`, or `input_dir` itself when it ends in the key's last component."""
    return input_dir if input_dir.name == key.rpartition("/")[2] else input_dir / key


def find_splits(path: Place, configs: Sequence[str | None] = (None,)) -> list[Split]:
    """The splits of some configurations of a data set folder; a single file is a split `train`.
    InputError when it is missing, holds no data that can be read, or lacks a configuration."""
    if is_data_file(path.name):
        wrong = [config for config in configs if config is not None]
        if wrong:
            raise InputError(f"{path}: a single file has no configuration {wrong[0]!r}; write null")
        return [Split(None, "train", (stat_file(path),))]
    folder = _Folder(path, {info.key_path: info for info in list_files(path)})
    return [
        Split(config, split, tuple(files))
        for config in configs
        for split, files in _splits(folder, config).items()
    ]


def find_split(
    path: Place, config: str | None, split: str, listed: Sequence[FileInfo] | None = None
) -> Split:
    """One split of a folder, whatever else of it is there; InputError with the names of those there
    are when it is missing. `listed` is what lies in the folder, where that is known."""
    found: Mapping[str, Sequence[FileInfo]]
    if is_data_file(path.name):
        found = {each.split: each.files for each in find_splits(path, [config])}
    else:
        files = list_files(path) if listed is None else listed
        found = _splits(_Folder(path, {info.key_path: info for info in files}), config, split)
    if split in found:
        return Split(config, split, tuple(found[split]))
    where = "the default configuration" if config is None else f"configuration {config!r}"
    raise InputError(f"{path}: {where} has no split {split!r}; there are: {', '.join(found)}")


@dataclass(frozen=True, slots=True)
class _Folder:
    place: Place
    files: Mapping[str, FileInfo]
    """By their path in it."""

    def below(self, name: str) -> _Folder:
        start = f"{name.strip('/')}/"
        inside = [path for path in self.files if path.startswith(start)]
        files = {path.removeprefix(start): self.files[path] for path in inside}
        return _Folder(self.place / name, files)

    def data(self) -> dict[str, FileInfo]:
        return {path: info for path, info in self.files.items() if _is_data(path)}

    def read(self, name: str) -> bytes:
        with open_input(self.files[name].place) as file:
            return file.read()


def _splits(folder: _Folder, config: str | None, only: str | None = None) -> Files:
    """All of a configuration, or at least the one that is wanted."""
    declared = _declared(folder)
    if declared:
        return _declared_splits(folder, _chosen(folder, declared, config), only)
    inside = folder if config is None else folder.below(config)
    if config is None or inside.files:
        return _laid_out(inside)
    if config == "default":
        return _laid_out(folder)
    names = {path.split("/")[0] for path in folder.data() if "/" in path}
    raise _no_config(folder, config, sorted(names))


def _laid_out(folder: _Folder) -> Files:
    if "dataset_dict.json" in folder.files:
        names = _state(folder, "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not names:
            raise InputError(f"{folder.place}/dataset_dict.json: names no splits; save it again")
        return {str(name): _saved_files(folder.below(str(name))) for name in names}
    if "state.json" in folder.files:
        split = str(_state(folder, "state.json").get("_split"))
        known = split != "None" and _SPLIT_NAME.fullmatch(split)
        return {split if known else "train": _saved_files(folder)}
    return _by_name(folder)


def _saved_files(folder: _Folder) -> list[FileInfo]:
    where = f"{folder.place}/state.json"
    if "state.json" not in folder.files:
        raise InputError(f"{where}: not found; the split was not saved completely")
    listed = _state(folder, "state.json").get("_data_files")
    names = [str(item.get("filename")) for item in listed or [] if isinstance(item, dict)]
    absent = [name for name in names if name not in folder.files]
    if absent or not names:
        what = f"names {absent[0]}, which is not there" if absent else "names no files"
        raise InputError(f"{where}: {what}; save the data set again")
    return [folder.files[name] for name in names]


def _state(folder: _Folder, name: str) -> dict[str, Any]:
    try:
        state = orjson.loads(folder.read(name))
    except orjson.JSONDecodeError as error:
        raise InputError(f"{folder.place}/{name}: not JSON: {error}; save it again") from error
    if not isinstance(state, dict):
        raise InputError(f"{folder.place}/{name}: not an object; save the data set again")
    return state


def _by_name(folder: _Folder) -> Files:
    """The files of one format, told apart by their names."""
    data = folder.data()
    if not data:
        raise _no_data(folder)
    by_format = (
        {path: info for path, info in data.items() if unpacked_name(path).endswith(suffixes)}
        for suffixes in _FORMATS
    )
    files = max(by_format, key=len)
    found: Files = {}
    for path, info in files.items():
        if shard := _SHARD.fullmatch(path):
            found.setdefault(shard[1], []).append(info)
    if found:
        in_order = [*(name for name in _NAMED if name in found), *sorted(found.keys() - _NAMED)]
        return {name: found[name] for name in in_order}
    for parts in (slice(-1), slice(-1, None)):  # the folders, then the names
        for split, named in _NAMED.items():
            for path, info in files.items():
                if any(map(named.search, path.split("/")[parts])):
                    found.setdefault(split, []).append(info)
        if found:
            return found
    return {"train": list(files.values())}


class _FrontMatter(yaml.SafeLoader):
    """The safe loader without merge keys: a few of them multiply to a billion."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """A merge key that stays is refused."""


def _declared(folder: _Folder) -> list[dict[str, Any]]:
    if "README.md" not in folder.files:
        return []
    where = f"{folder.place}/README.md"
    lines = folder.read("README.md").decode("utf-8-sig", "replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return []
    end = next((place for place, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    try:
        front = yaml.load("\n".join(lines[1:end]), _FrontMatter)
    except (*_NO_YAML, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: the front matter is not YAML: {reason}; correct it") from error
    configs = front.get("configs") if isinstance(front, dict) else None
    if not isinstance(configs, list | None) or not all(
        isinstance(config, dict) and isinstance(config.get("config_name"), str)
        for config in configs or []
    ):
        raise InputError(f"{where}: `configs` is not a list of mappings with a `config_name`")
    return configs or []


def _chosen(
    folder: _Folder, declared: Sequence[dict[str, Any]], config: str | None
) -> dict[str, Any]:
    by_name = {block["config_name"]: block for block in declared}
    if config is not None:
        if config not in by_name:
            raise _no_config(folder, config, list(by_name))
        return by_name[config]
    if default := next((block for block in declared if block.get("default")), None):
        return default
    if "default" in by_name or len(declared) == 1:
        return by_name.get("default", declared[0])
    names = ", ".join(by_name)
    raise InputError(f"{folder.place}: has no default configuration; name one of: {names}")


def _declared_splits(folder: _Folder, config: Mapping[str, Any], only: str | None) -> Files:
    inside = folder.below(str(config["data_dir"])) if config.get("data_dir") else folder
    data_files = config.get("data_files")
    if data_files is None:
        return _laid_out(inside)
    where = f"{folder.place}/README.md, config {config['config_name']!r}"
    declared = _patterns(data_files, where)
    return {
        split: _declared_files(inside, patterns, f"{where}, split {split!r}")
        for split, patterns in declared.items()
        if only not in declared or split == only
    }


def _patterns(data_files: Any, where: str) -> dict[str, list[str]]:
    """Paths and globs by split, from any of the forms that the front matter may have."""
    if isinstance(data_files, dict):
        named = [*data_files.items()]
    elif isinstance(data_files, list) and all(isinstance(item, dict) for item in data_files):
        named = [(item.get("split"), item.get("path")) for item in data_files]
    else:
        named = [("train", data_files)]
    found = {str(split): [path] if isinstance(path, str) else path for split, path in named}
    are_names = all(
        isinstance(paths, list) and paths and all(isinstance(path, str) for path in paths)
        for paths in found.values()
    )
    if len(found) < len(named) or not (are_names and all(map(_SPLIT_NAME.fullmatch, found))):
        raise InputError(f"{where}: `data_files` is neither paths nor {{split, path}}, each once")
    return found


def _declared_files(folder: _Folder, patterns: Iterable[str], where: str) -> list[FileInfo]:
    found: dict[str, FileInfo] = {}
    for pattern in patterns:
        parts = PurePosixPath(pattern).parts
        fitting = [path for path in folder.files if _fits(PurePosixPath(path).parts, parts)]
        data = [path for path in fitting if _is_data(path)]
        if not data:
            why = f"only files that cannot be read: {fitting[0]}" if fitting else "no file"
            raise InputError(f"{where}: {pattern!r} fits {why}; {_READABLE}")
        found |= {path: folder.files[path] for path in data}
    return list(found.values())


@lru_cache(10_000)  # without it several `**` take time without end
def _fits(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """`**` stands for any folders, the other wildcards for parts of one name."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_fits(path[start:], pattern[1:]) for start in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _is_data(path: str) -> bool:
    in_special = any(folder.startswith("__") for folder in path.split("/")[:-1])
    return is_data_file(path) and not in_special


def _no_config(folder: _Folder, config: str, names: Sequence[str]) -> InputError:
    there = f"there are: {', '.join(names)}" if names else "it has none; write null"
    return InputError(f"{folder.place}: no configuration {config!r}; {there}")


def _no_data(folder: _Folder) -> InputError:
    scripts = [path for path in folder.files if path.endswith(".py") and "/" not in path]
    if scripts:
        return InputError(
            f"{folder.place}: only the data set script {scripts[0]}, and scripts are refused "
            "because to read the data is to run somebody's program; run it once where you trust "
            "it, with `datasets` before version 4, and save each split with `to_parquet`"
        )
    kinds = sorted({PurePosixPath(path).suffix or path for path in folder.files})
    there = f"there are: {', '.join(kinds)}" if kinds else "it is empty"
    return InputError(f"{folder.place}: no data files; {there}; {_READABLE}")
