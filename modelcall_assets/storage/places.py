"""Where files lie: paths on this machine, and keys in stores behind fsspec."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import StoreOptions
from modelcall_assets.records.secrets import Remover, in_options


class Store:
    """A file system, made when it is first used: in the process that uses it."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options

    @cached_property
    def fs(self) -> Any:
        """InputError when there is no driver for this kind of store, or it cannot be made."""
        import fsspec

        kind, options = self._options.filesystem, self._options.options
        try:
            if ":" not in kind:
                made = fsspec.filesystem(kind, use_listings_cache=False, **options)
                if self.is_s3:
                    made.retries = 1  # botocore has its own; together they took hours
                return made
            module, _, name = kind.partition(":")
            return getattr(importlib.import_module(module), name)(**options)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            self.take_secrets_out(error)
            raise InputError(
                f"{self._options.prefix} ({self._options.name}): no file system '{kind}': {error}; "
                "install the package that has it, or correct the store's options"
            ) from error

    def take_secrets_out(self, error: BaseException | None) -> None:
        """Of what a driver raised and of what led to it: some tell the keys that they have."""
        while error is not None:
            error.args = tuple(map(self._told, error.args))
            if isinstance(error, OSError) and error.strerror:
                error.strerror = self._told(error.strerror)
            error = error.__cause__ or error.__context__

    def _told(self, value: Any) -> Any:
        return self._remover.text(value) if isinstance(value, str) else value

    @cached_property
    def _remover(self) -> Remover:
        return Remover((*self._options.secrets, *in_options(self._options.options)))

    @property
    def is_s3(self) -> bool:
        return self._options.filesystem == "s3"


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A key in a store, with what of pathlib's interface is of use here; asks nobody anything."""

    uri: str
    store: Store = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(f"{self.uri.rstrip('/')}/{name}", self.store)

    @property
    def key(self) -> str:
        """As fsspec takes it: `bucket/key`."""
        return self.uri.partition("://")[2].rstrip("/")

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.uri.rpartition("/")[0], self.store)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def at(self, key: str) -> RemotePath:
        """Another key of the store, as fsspec gives it."""
        return RemotePath(f"{self.uri.partition('://')[0]}://{key}", self.store)


Place = Path | RemotePath


class Stores:
    """The stores that a task may name; `options` are by prefix, the longest first."""

    def __init__(self, options: Sequence[StoreOptions] = ()) -> None:
        self._known = [(each, Store(each)) for each in options]

    def place(self, text: str) -> Place:
        """Of an absolute path or a URI."""
        scheme, separator, _ = text.partition("://")
        if not separator or scheme == "file":
            return Path(text.removeprefix("file://")).absolute()
        for options, store in self._known:
            if f"{text}/".startswith(options.prefix):
                return RemotePath(text, store)
        options = StoreOptions(scheme, f"{scheme}://", scheme, {})
        self._known.append((options, Store(options)))
        return RemotePath(text, self._known[-1][1])
