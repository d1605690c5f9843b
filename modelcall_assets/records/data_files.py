"""How the names of data files end."""

from __future__ import annotations

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
