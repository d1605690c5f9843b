"""What stores and disks raise, as errors that say what to check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from modelcall_assets.errors import InputError, ModelcallError, StoreError
from modelcall_assets.records.data_files import COLUMN_SUFFIXES, LINE_SUFFIXES
from modelcall_assets.records.secrets import without_users
from modelcall_assets.storage.places import Place

T = TypeVar("T")
Doing = Literal["read", "written", "deleted"]

READ_ATTEMPTS = 4
PATIENCE_S = 120.0
_PAUSE_S = 0.5
_MOST_CHARS = 300
_KEYS = "the access key, the secret and what they may do with this bucket"
_CLOCK = "the clock of this machine"
_ENDPOINT = "the store's endpoint and region"
_LOAD = "whether the store is overloaded"
_CHECK = {
    "AccessDenied": _KEYS,
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "InvalidToken": _KEYS,
    "403": f"{_KEYS}, and {_CLOCK}",
    "ExpiredToken": "the session token: it has expired",
    "400": f"the session token, and {_ENDPOINT}",
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "AuthorizationHeaderMalformed": _ENDPOINT,
    "IllegalLocationConstraintException": _ENDPOINT,
    "PermanentRedirect": _ENDPOINT,
    "301": _ENDPOINT,
    "NoSuchBucket": f"the name of the bucket, and {_ENDPOINT}",
    "InvalidBucketName": "the name of the bucket",
    "KeyTooLongError": "the length of the path: stores take 1,024 bytes",
    "PreconditionFailed": "whether somebody is writing it: it has changed meanwhile",
    "412": "whether somebody is writing it: it has changed meanwhile",
    "SlowDown": _LOAD,
    "ServiceUnavailable": _LOAD,
    "503": _LOAD,
    "InternalError": "whether the store is well",
    "500": "whether the store is well",
    "EntityTooLarge": "the store's limit on the size of an object",
    "QuotaExceeded": "the quota of the bucket",
}
"""By the store's error code; of a request without an answer's body that is only its status."""


@contextmanager
def explained(
    place: Place,
    kind: type[ModelcallError] = InputError,
    doing: Doing | None = None,
    *,
    absent: type[Exception] | None = None,
) -> Iterator[None]:
    """Turn what a disk or store raises into an error of `kind` that names `place` and what to
    check. With `absent` that there is no such file is told as it is."""
    what: Doing = doing or ("written" if kind is StoreError else "read")
    try:
        yield
    except ModelcallError:
        raise
    except FileNotFoundError as error:
        _take_secrets_out(place, error)
        is_there = code_of(error) != "NoSuchBucket"
        if is_there and absent is not None and isinstance(error, absent):
            raise
        if is_there and kind is InputError:
            raise InputError(
                f"{place}: not found; correct the path or put the data there"
            ) from error
        raise kind(_told(place, what, error)) from error
    except NotADirectoryError as error:
        suffixes = ", ".join((*LINE_SUFFIXES, *COLUMN_SUFFIXES))
        raise kind(f"{place}: a file and no folder; one of rows ends in {suffixes}") from error
    except IsADirectoryError as error:
        raise kind(f"{place}: a folder where a file belongs; move it away") from error
    except _raised_by(place) as error:
        _take_secrets_out(place, error)
        raise kind(_told(place, what, error)) from error


def patiently(read: Callable[[], T]) -> T:
    """What `read` gives, at the second try when an answer broke off: the driver repeats only
    requests that got none."""
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
    """Of the store's own error, which fsspec's may only carry; nothing when it did not answer."""
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


def _take_secrets_out(place: Place, error: BaseException) -> None:
    if not isinstance(place, Path):
        place.store.take_secrets_out(error)


def _raised_by(place: Place) -> tuple[type[Exception], ...]:
    if isinstance(place, Path):
        return (OSError,)
    if not place.store.is_s3:
        return (Exception,)  # each driver has its own
    from aiohttp import ClientError as TransportError
    from botocore.exceptions import BotoCoreError, ClientError  # a dead endpoint is no OSError

    # A store that redirects without saying where to sends botocore round in circles.
    return (OSError, ValueError, RecursionError, BotoCoreError, ClientError, TransportError)


def _told(place: Place, doing: Doing, error: Exception) -> str:
    if isinstance(place, Path):
        return f"{place}: cannot be {doing}: {error}"
    bucket, _, key = place.key.partition("/")
    where = f"bucket {bucket}, key {key}" if key else f"bucket {bucket}"
    code = code_of(error)
    why = f"{code}: {_plain(error)}" if code else _plain(error)
    return f"{place}: cannot be {doing} ({where}): {why}; check {_to_check(code, error)}"


def _to_check(code: str, error: Exception) -> str:
    what = f"{type(error).__name__} {error}"
    if not code and "Credential" in what:
        return "the keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    if not code and "Invalid bucket name" in what:
        return _CHECK["InvalidBucketName"]
    return _CHECK.get(code, f"the network, and {_ENDPOINT}")


def _plain(error: Exception) -> str:
    """On one line, and without a password in a URL."""
    text = without_users(" ".join(str(error).split())).rstrip(".")
    text = text or type(error).__name__
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"
