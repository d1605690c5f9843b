"""Where files lie: paths on this machine, and keys in stores behind fsspec; and what disks and
stores raise, as errors that say what to check."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from modelcall_assets.errors import InputError, ModelcallError, StoreError
from modelcall_assets.records import COLUMN_SUFFIXES, LINE_SUFFIXES, StoreOptions
from modelcall_assets.records.secrets import Remover, in_options, without_users

T = TypeVar("T")

READ_ATTEMPTS = 4
PATIENCE_S = 120.0
_PAUSE_S = 0.5
_MOST_CHARS = 300
_KEYS = "the access key, the secret and what they may do with this bucket"
_CLOCK = "the clock of this machine"
_ENDPOINT = "the store's endpoint and region"
_CHECK = {
    code: what
    for what, codes in {
        _KEYS: "AccessDenied InvalidAccessKeyId SignatureDoesNotMatch InvalidToken",
        f"{_KEYS}, and {_CLOCK}": "403",
        "the session token: it has expired": "ExpiredToken",
        f"the session token, and {_ENDPOINT}": "400",
        _CLOCK: "RequestTimeTooSkewed RequestExpired",
        _ENDPOINT: "AuthorizationHeaderMalformed IllegalLocationConstraintException "
        "PermanentRedirect 301",
        f"the name of the bucket, and {_ENDPOINT}": "NoSuchBucket",
        "the name of the bucket": "InvalidBucketName",
        "the length of the path: stores take 1,024 bytes": "KeyTooLongError",
        "whether somebody is writing it: it has changed meanwhile": "PreconditionFailed 412",
        "whether the store is overloaded": "SlowDown ServiceUnavailable 503",
        "whether the store is well": "InternalError 500",
        "the store's limit on the size of an object": "EntityTooLarge",
        "the quota of the bucket": "QuotaExceeded",
    }.items()
    for code in codes.split()
}
"""By the store's error code; of a request without an answer's body that is only its status."""


class Store:
    """A file system, made when it is first used: in the process that uses it."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options

    @cached_property
    def fs(self) -> Any:
        """InputError when there is no driver for this kind of store, or it cannot be made."""
        import fsspec

        kind, options = self.options.filesystem, self.options.options
        try:
            if ":" not in kind:
                fs = fsspec.filesystem(kind, use_listings_cache=False, **options)
                if self.is_s3:
                    fs.retries = 1  # botocore has its own; together they took hours
                return fs
            module, _, name = kind.partition(":")
            return getattr(importlib.import_module(module), name)(**options)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            self.take_secrets_out(error)
            raise InputError(
                f"{self.options.prefix} ({self.options.name}): no file system '{kind}': {error}; "
                "install the package that has it, or correct the store's options"
            ) from error

    def take_secrets_out(self, error: BaseException | None) -> None:
        """Out of what a driver raised and of what led to it: some tell the keys that they have."""
        clean = Remover((*self.options.secrets, *in_options(self.options.options))).text
        while error is not None:
            error.args = tuple(clean(arg) if isinstance(arg, str) else arg for arg in error.args)
            if isinstance(error, OSError) and error.strerror:
                error.strerror = clean(error.strerror)
            error = error.__cause__ or error.__context__

    @property
    def is_s3(self) -> bool:
        return self.options.filesystem == "s3"


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
    def parent(self) -> RemotePath:
        return RemotePath(self.uri.rpartition("/")[0], self.store)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def at(self, key: str) -> RemotePath:
        return RemotePath(f"{self.uri.partition('://')[0]}://{key}", self.store)


Place = Path | RemotePath


class Stores:
    """The stores that a task may name; `options` are by prefix, the longest first."""

    def __init__(self, options: Sequence[StoreOptions] = ()) -> None:
        self._known = [*map(Store, options)]

    def place(self, text: str) -> Place:
        scheme, separator, _ = text.partition("://")
        if not separator or scheme == "file":
            return Path(text.removeprefix("file://")).absolute()
        for store in self._known:
            if f"{text}/".startswith(store.options.prefix):
                return RemotePath(text, store)
        self._known.append(Store(StoreOptions(scheme, f"{scheme}://", scheme, {})))
        return RemotePath(text, self._known[-1])


@contextmanager
def explained(
    place: Place,
    kind: type[ModelcallError] = InputError,
    doing: Literal["read", "written", "deleted"] | None = None,
    *,
    may_be_absent: bool = False,
) -> Iterator[None]:
    """Turn what a disk or store raises into an error of `kind` that names `place` and what to
    check. Where a file `may_be_absent`, FileNotFoundError says so."""
    try:
        yield
    except ModelcallError:
        raise
    except _raised_by(place) as error:
        if isinstance(place, RemotePath):
            place.store.take_secrets_out(error)
        is_absent = isinstance(error, FileNotFoundError) and code_of(error) != "NoSuchBucket"
        if is_absent and may_be_absent:
            raise
        if is_absent and kind is InputError:
            wrong = f"{place}: not found; correct the path or put the data there"
        elif isinstance(error, NotADirectoryError) and kind is StoreError:
            wrong = f"{place}: a folder above it is a file; move that away"
        elif isinstance(error, NotADirectoryError):
            suffixes = ", ".join((*LINE_SUFFIXES, *COLUMN_SUFFIXES))
            wrong = f"{place}: a file and no folder; one of rows ends in {suffixes}"
        elif isinstance(error, IsADirectoryError):
            wrong = f"{place}: a folder where a file belongs; move it away"
        else:
            usual = "written" if kind is StoreError else "read"
            wrong = _what_failed(place, doing or usual, error)
        raise kind(wrong) from error


def patiently(read: Callable[[], T]) -> T:
    """What `read` gives; again when an answer broke off: drivers repeat only what got none."""
    from aiohttp import ClientPayloadError
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    broken = (ClientPayloadError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError)
    end = time.monotonic() + PATIENCE_S
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return read()
        except broken:
            if time.monotonic() > end:
                raise
            time.sleep(_PAUSE_S)
    return read()


def code_of(error: BaseException) -> str:
    """Of the store's own error, which fsspec's may only carry; empty when it did not answer."""
    at: BaseException | None = error
    while at is not None:
        response: Any = getattr(at, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        at = at.__cause__
    return ""


def is_absent(error: BaseException) -> bool:
    """Whether an explained error says that there is no such file or folder."""
    return isinstance(error.__cause__, FileNotFoundError) and code_of(error) != "NoSuchBucket"


def _raised_by(place: Place) -> tuple[type[Exception], ...]:
    if isinstance(place, Path):
        return (OSError,)
    if not place.store.is_s3:
        return (Exception,)  # each driver has its own
    from aiohttp import ClientError as TransportError
    from botocore.exceptions import BotoCoreError, ClientError  # a dead endpoint is no OSError

    # A store that redirects without saying where to sends botocore round in circles.
    return (OSError, ValueError, RecursionError, BotoCoreError, ClientError, TransportError)


def _what_failed(place: Place, doing: str, error: Exception) -> str:
    if isinstance(place, Path):
        return f"{place}: cannot be {doing}: {error}"
    bucket, _, key = place.key.partition("/")
    where = f"bucket {bucket}, key {key}" if key else f"bucket {bucket}"
    code = code_of(error)
    text = without_users(" ".join(str(error).split())).rstrip(".") or type(error).__name__
    why = text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"
    why = f"{code}: {why}" if code else why
    check = _CHECK.get(code, f"the network, and {_ENDPOINT}")
    if not code and "Credential" in f"{type(error).__name__} {error}":
        check = "the keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    elif not code and "Invalid bucket name" in str(error):
        check = _CHECK["InvalidBucketName"]
    return f"{place}: cannot be {doing} ({where}): {why}; check {check}"
