"""What every floor shares. Here, files by their names: what data files end in, the partition keys
of paths, the stores of URIs.

A partition key is an input file's relative path. Dagster accepts any key when it is added, then
cannot backfill one that holds a comma, a control character, `...`, `|` or leading or trailing
space. Those, and `%` itself, are percent-encoded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
COLUMN_SUFFIXES = (".parquet", ".arrow", ".feather")
PACKINGS = (".gz", ".zst")
DATA_SUFFIXES = tuple(
    f"{suffix}{packing}"
    for suffix in (*LINE_SUFFIXES, *COLUMN_SUFFIXES)
    for packing in ("", *PACKINGS)
)
"""Compressed files of columns are listed, so that they are refused and not passed over."""
_NOT_DATA = frozenset(
    {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
"""What the library `datasets` leaves beside the data."""
_UNSAFE_IN_KEYS = re.compile(
    r"[%,|\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|\.(?=\.\.)|(?<=\.)\.(?=\.)|^\s|\s$"
)


def is_data_file(path: str) -> bool:
    """By its name; that the content may be something else is for `storage.formats`."""
    name = path.rpartition("/")[2].lower()
    return name.endswith(DATA_SUFFIXES) and name not in _NOT_DATA


def stem_of(name: str) -> str:
    """A data file's name without the suffixes that say what it is: `a.b.jsonl.gz` → `a.b`."""
    return next((name[: -len(end)] for end in DATA_SUFFIXES if name.lower().endswith(end)), name)


def unpacked_name(name: str) -> str:
    """Lower case, without the suffix of a compression: `A.json.GZ` → `a.json`."""
    name = name.lower()
    return next((name[: -len(end)] for end in PACKINGS if name.endswith(end)), name)


def encode_key(relative_path: str) -> str:
    """`a,b.jsonl` → `a%2Cb.jsonl`. Inverse of `decode_key` for every path."""

    def percent(found: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogateescape"))

    return _UNSAFE_IN_KEYS.sub(percent, relative_path)


def decode_key(key: str) -> str:
    return unquote(key, errors="surrogateescape")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How the files under a prefix are reached. `filesystem` is a protocol of fsspec's, or
    `package.module:Class` of the user's; `options` are its arguments, and may hold secrets."""

    name: str
    prefix: str
    filesystem: str
    options: Mapping[str, Any] = field(repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Besides those that the options show by their names."""
