"""What stores and disks raise, as errors that say what to check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelcall_assets.errors import InputError, ModelcallError, StoreError
from modelcall_assets.storage.places import Place

_KEYS = "the access key, the secret and what they may do with this bucket"
_ENDPOINT = "the store's endpoint and region"
_CHECK = {
    "AccessDenied": _KEYS,
    "Forbidden": _KEYS,
    "403": _KEYS,
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "InvalidToken": _KEYS,
    "ExpiredToken": "the session token: it has expired",
    "RequestTimeTooSkewed": "the clock of this machine",
    "RequestExpired": "the clock of this machine",
    "AuthorizationHeaderMalformed": _ENDPOINT,
    "IllegalLocationConstraintException": _ENDPOINT,
    "PermanentRedirect": _ENDPOINT,
    "301": _ENDPOINT,
    "NoSuchBucket": "the name of the bucket, and the store's endpoint and region",
    "SlowDown": "whether the store is overloaded",
    "ServiceUnavailable": "whether the store is overloaded",
    "InternalError": "whether the store is well",
    "EntityTooLarge": "the store's limit on the size of an object",
    "QuotaExceeded": "the quota of the bucket",
}
"""By the store's error code."""


@contextmanager
def explained(
    place: Place,
    kind: type[ModelcallError] = InputError,
    *,
    absent: type[Exception] | None = None,
) -> Iterator[None]:
    """Turn what a store raises into an error of `kind` that names `place` and what to check.
    With `absent` that there is no such file is told as it is."""
    try:
        yield
    except FileNotFoundError as error:
        if absent is not None and isinstance(error, absent) and code_of(error) != "NoSuchBucket":
            raise
        if kind is InputError and code_of(error) != "NoSuchBucket":
            raise InputError(
                f"{place}: not found; correct the path or put the data there"
            ) from error
        raise kind(_told(place, kind, error)) from error
    except _store_errors(place) as error:
        raise kind(_told(place, kind, error)) from error


def code_of(error: BaseException) -> str:
    """Of the store's own error, which fsspec's may only carry; nothing when it did not answer."""
    at: BaseException | None = error
    while at is not None:
        response: Any = getattr(at, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        at = at.__cause__
    return ""


def _store_errors(place: Place) -> tuple[type[Exception], ...]:
    if isinstance(place, Path):
        return (OSError,)
    from botocore.exceptions import BotoCoreError, ClientError  # a dead endpoint is no OSError

    return (OSError, BotoCoreError, ClientError)


def is_absent(error: BaseException) -> bool:
    """Whether an explained error says that there is no such file or folder."""
    return isinstance(error.__cause__, FileNotFoundError) and code_of(error) != "NoSuchBucket"


def _told(place: Place, kind: type[ModelcallError], error: Exception) -> str:
    what = "cannot be written" if kind is StoreError else "cannot be read"
    if isinstance(place, Path):
        return f"{place}: {what}: {error}"
    code = code_of(error)
    check = _CHECK.get(code, f"the network, and {_ENDPOINT}")
    bucket, _, key = place.key.partition("/")
    where = f"bucket {bucket}, key {key}" if key else f"bucket {bucket}"
    return f"{place}: {what} ({where}): {code and f'{code}: '}{error}; check {check}"
