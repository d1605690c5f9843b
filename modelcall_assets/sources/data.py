"""Where the rows of a source come from: splits of data sets in a folder or on the Hugging Face Hub,
and single files. What is on this machine or in a store is read there; only `fetch` asks the Hub."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shlex
import shutil
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import escape
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.storage.columns import MOST_ROWS
from modelcall_assets.storage.datasets import find_split
from modelcall_assets.storage.files import file_digest, publish
from modelcall_assets.storage.formats import Reading
from modelcall_assets.storage.listing import FileInfo, find_file, list_files
from modelcall_assets.storage.places import Place, Stores
from modelcall_assets.storage.publishing import claimed
from modelcall_assets.storage.rows import ColumnBatch, read_batches

TIMEOUT_S = 60.0
"""Of a server that says nothing."""
_SEED = 42
_STRICT = Reading(on_bad_line="fail")
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})")
_TYPE = "dataset"
"""As the Hub calls it."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelcall"


def place_of(where: str | Place) -> Place:
    return Stores().place(where) if isinstance(where, str) else where


class Origin(ABC):
    """Files that are here, or can be fetched."""

    @abstractmethod
    def found(self) -> list[FileInfo]:
        """All of them, in reading order, without asking the network for more than a listing of the
        store that they are in; empty when one is not here."""

    @abstractmethod
    def fetch(self) -> list[FileInfo]:
        """As `found`, after what is not here was brought. InputError when it cannot be had,
        SetupError when a package for that is missing."""

    @property
    @abstractmethod
    def absent(self) -> str:
        """Where was looked, and how to get it by hand."""

    @property
    @abstractmethod
    def is_remote(self) -> bool:
        """Whether `fetch` can bring it."""

    def files(self) -> list[FileInfo]:
        """As `found`; InputError when they are not here."""
        if files := self.found():
            return files
        raise InputError(self.absent)

    def ready(self) -> list[FileInfo]:
        """Those that are here, else fetched; raises what `fetch` does."""
        return self.found() or self.fetch()


@dataclass(frozen=True)
class DatasetSplit(Origin):
    """A split of the data set `<org>/<name>`: in `<folder>/<org>/<name>`, where there is something
    of it, else on the Hub, in what its library caches. `subset` is None for the only one."""

    dataset: str
    subset: str | None
    split: str
    folder: Place | None = None

    def found(self) -> list[FileInfo]:
        return self._in_folder() or self._in_cache()

    def fetch(self) -> list[FileInfo]:
        if files := self._in_folder():
            return files
        download: Any = package("huggingface_hub").snapshot_download
        try:
            snapshot = download(self.dataset, repo_type=_TYPE, allow_patterns=["README.md"])
            needed = [escape(file.key_path) for file in self._listed(Path(snapshot))]
            commit = Path(snapshot).name
            download(self.dataset, repo_type=_TYPE, revision=commit, allow_patterns=needed)
        except InputError:
            raise
        except Exception as error:  # those of several libraries, other ones in each version
            # That a file is not in the cache says less than why it could not be fetched.
            first = error.__cause__ if isinstance(error, FileNotFoundError) else None
            why = " ".join(str(first or error).split()) or type(error).__name__
            raise InputError(f"{self.absent}. The Hub: {why}") from error
        return self.files()

    @property
    def absent(self) -> str:
        what = " ".join(filter(None, (self.dataset, self.subset, self.split)))
        own = "" if self.folder is None else f"{self.folder / self.dataset}, nor in "
        command = ["hf", "download", self.dataset, "--repo-type", _TYPE]
        if self.subset:
            command += ["--include", "README.md", "--include", f"{self.subset}/*"]
        if isinstance(self.folder, Path):
            command += ["--local-dir", str(self.folder / self.dataset)]
        return f"{what}: not in {own}the Hub's cache; get it with: {shlex.join(command)}"

    @property
    def is_remote(self) -> bool:
        return find_spec("huggingface_hub") is not None

    def _in_folder(self) -> list[FileInfo]:
        place = None if self.folder is None else self.folder / self.dataset
        return [] if place is None else split_in(place, self.subset, self.split)

    def _in_cache(self) -> list[FileInfo]:
        """Of the commit that was fetched last; its listing, which the library keeps, tells a split
        that is complete from what a kill has left."""
        try:
            import huggingface_hub as hub
            from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
        except ImportError:
            return []
        only = {"repo_type": _TYPE, "allow_patterns": ["README.md"], "local_files_only": True}
        try:
            files = self._listed(Path(hub.snapshot_download(self.dataset, **only)))
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            return []
        found = ((file, find_file(file.place)) for file in files)
        here = [replace(info, key_path=file.key_path) for file, info in found if info is not None]
        return here if len(here) == len(files) else []

    def _listed(self, snapshot: Path) -> list[FileInfo]:
        """The split's files by the cached listing, each where it is or will be."""
        listing: Any = package("huggingface_hub").get_cached_repo_tree
        tree = listing(self.dataset, repo_type=_TYPE, revision=snapshot.name)
        names = sorted(file.path for file in tree)
        listed = [FileInfo(name, snapshot / name, 0, snapshot.name) for name in names]
        return [*find_split(snapshot, self.subset, self.split, listed).files]


@dataclass(frozen=True)
class FolderSplit(Origin):
    """A split of the data set in a folder."""

    folder: Place
    subset: str | None
    split: str

    def found(self) -> list[FileInfo]:
        return split_in(self.folder, self.subset, self.split)

    def fetch(self) -> list[FileInfo]:
        return self.files()

    @property
    def absent(self) -> str:
        return f"{self.folder}: no such folder, or there is nothing in it; correct the path"

    @property
    def is_remote(self) -> bool:
        return False


def split_in(place: Place, subset: str | None, split: str) -> list[FileInfo]:
    """Of the data set in a folder; empty where there is nothing. InputError when it has no such
    split, or not all of its files."""
    if not (listed := list_files(place, may_be_absent=True)):
        return []
    files = [*find_split(place, subset, split, listed).files]
    shards = [shard for file in files if (shard := _SHARD.match(file.key_path))]
    wanted = sum({shard[1]: int(shard[2]) for shard in shards}.values())
    if len(shards) < wanted:
        what = f"{len(shards)} of {wanted} files of the split {split!r} are there"
        raise InputError(f"{place}: {what}; bring the others")
    return files


@dataclass(frozen=True)
class OneFile(Origin):
    """A path, a key in a store, or a URL of HTTP, whose file is kept in `cache_folder()`. `sha256`
    is of the content, in hexadecimal. `why` says in errors what the file is for."""

    where: str | Place
    why: str
    sha256: str | None = None

    def found(self) -> list[FileInfo]:
        info = find_file(self._place)
        if info is None:
            return []
        if self.sha256 and (wrong := self._unlike(file_digest(self._place))):
            again = "delete it, so that it is fetched again"
            fix = again if self.is_remote else "bring the right one"
            raise InputError(f"{self._place}: {wrong}; {fix}")
        return [info]

    def fetch(self) -> list[FileInfo]:
        """One process at a time fetches a URL; the others find the file."""
        if self.is_remote:
            with claimed(cache_folder() / "locks", self._place.name):
                if find_file(self._place) is None:
                    self._download()
        return self.files()

    @property
    def absent(self) -> str:
        if self.is_remote:
            return f"{self.where}: not fetched yet, {self._place} is not there; put it there"
        return f"{self.where}: not found; {self.why}; correct the path, or put the file there"

    @property
    def is_remote(self) -> bool:
        return str(self.where).startswith(("http://", "https://"))

    @property
    def _place(self) -> Place:
        if not self.is_remote:
            return place_of(self.where)
        name = hashlib.sha256(str(self.where).encode()).hexdigest()[:16]
        return cache_folder() / name

    def _unlike(self, digest: str | None) -> str:
        """What is wrong with content that has this digest."""
        is_right = not self.sha256 or digest == f"sha256:{self.sha256.lower()}"
        return "" if is_right else f"{digest} and not sha256:{self.sha256}"

    def _download(self) -> None:
        try:
            with (
                urlopen(str(self.where), timeout=TIMEOUT_S) as reply,
                publish(self._place) as out,
            ):
                shutil.copyfileobj(reply, out)
                if reply.length:
                    raise OSError(f"it broke off, {reply.length} bytes are missing")
                if wrong := self._unlike(out.digest):
                    raise OSError(f"it has {wrong}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            fix = f"correct the URL, or put the file at {self._place}"
            raise InputError(f"{self.where}: cannot be fetched: {error}; {fix}") from error


class Rows:
    """The rows of some files, one after another, as they were read until one is asked for."""

    def __init__(self, files: Sequence[FileInfo], reading: Reading = _STRICT) -> None:
        """InputError when one of them cannot be read."""
        self._batches = [
            batch for file in files for batch in read_batches(file.place, reading, rows=MOST_ROWS)
        ]
        self._ends = [*accumulate(batch.rows for batch in self._batches)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> tuple[Row, str]:
        """With its place for people. InputError when it is none."""
        at = bisect_right(self._ends, index)
        batch = self._batches[at]
        inside = index - self._ends[at] + batch.rows
        if isinstance(batch, ColumnBatch):
            columns = batch.columns.slice(inside, 1)
            one = replace(batch, start=batch.start + inside, columns=columns)
            where = f"{batch.place}, row {one.start + 1}"
        else:
            some = slice(inside, inside + 1)
            one = replace(batch, lines=batch.lines[some], numbers=batch.numbers[some])
            where = f"{batch.place}, line {one.numbers[0]}"
        (item,) = one.items
        if isinstance(item, BadLine):
            raise InputError(f"{batch.place}, {item.detail}")
        return item, where


def shuffled(rows: int, seed: int = _SEED) -> Sequence[int]:
    """The order in which nanochat, with the seed 42, and `datasets` shuffle so many rows."""
    return package("numpy").random.default_rng(seed).permutation(rows)


def package(name: str, field: str = "sources", extra: str = "evaluation") -> Any:
    """SetupError when it is not installed: `field` needs it, the `extra` has it."""
    try:
        return import_module(name)
    except ImportError as error:
        wrong = f"the package {name} cannot be imported ({error})"
        fix = f"pip install 'modelcall-assets[{extra}]'"
        raise SetupError([Problem(field, "", wrong, fix=fix)]) from error
