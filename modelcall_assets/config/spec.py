"""One task, resolved: its files, folders, environment and stores."""

import ipaddress
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

from modelcall_assets.config import problem_of
from modelcall_assets.config.datasets import DatasetConfig, MergeGroup
from modelcall_assets.config.distillation import DistillationTask
from modelcall_assets.config.files import Check, Environment, Expander, MissingVariable
from modelcall_assets.config.model import ModelConfig
from modelcall_assets.config.places import (
    STORAGE_FILE,
    TOS_HOST,
    Storage,
    StorageFile,
    StoreProfile,
    checked_endpoint,
    is_bucket,
    is_relative,
    is_uri,
    is_within,
    resolve,
    shown_place,
)
from modelcall_assets.config.prompt import PromptConfig
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import Problem
from modelcall_assets.records import StoreOptions, is_data_file
from modelcall_assets.records.secrets import REFERENCE, in_url, is_reference


@dataclass(frozen=True)
class Link:
    spec: "TaskSpec"
    stage: str


@dataclass(frozen=True)
class TaskSpec:
    """A task that can run. Folders are absolute paths or URIs, in their simplest spelling."""

    path: Path
    root: Path
    name: str
    key: str
    """As Dagster takes it."""
    task: ScoringTask | DistillationTask
    env: Environment
    file_name: str
    """The task file, relative to the project root."""
    warnings: tuple[Problem, ...] = ()
    model: ModelConfig | None = None
    """The one that rates; with its prompt, or there is a scorer."""
    prompt: PromptConfig | None = None
    generator: ModelConfig | None = None
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict[str, DatasetConfig])
    """Of a chatml stage, by key."""
    groups: Sequence[MergeGroup] = ()
    link: Link | None = None
    """Where the input of the first step comes from, if that is another task of the project."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """The files of model, prompt, generator, datasets and groups, relative to the root."""
    data_root: str | None = None
    """Where relative data folders lie; None is the root."""
    storage: StorageFile = field(default_factory=StorageFile)
    store_options: Sequence[StoreOptions] = field(default=(), repr=False)
    """How the stores among its places are reached, the longest prefix first."""

    @cached_property
    def folders(self) -> list[str]:
        """Where its stages leave their files; raw leaves none."""
        return [*map(self.folder, self.task.stage_folders)]

    @property
    def input_folder(self) -> str:
        return self.resolved(self.task.input_folder)

    @property
    def has_one_input(self) -> bool:
        folder = self.input_folder
        return is_data_file(folder) and not is_bucket(folder)

    def folder(self, stage: str) -> str:
        """Where a stage other than raw leaves its files."""
        folder = self.task.stage_folders[stage]
        return self.resolved(folder) if folder else f"{self.input_folder}_preprocessed"

    @property
    def journal_folder(self) -> str:
        """Raw replies and the state of the stages."""
        if self.task.journal_folder:
            return self.resolved(self.task.journal_folder)
        return f"{self.resolved(self.task.state_folder)}/.modelcall"

    @property
    def log_folder(self) -> Path | None:
        """Of the files that its runs leave for people."""
        folder = self.task.logging.log_dir
        return Path(os.path.normpath(self.root / folder / self.key)) if folder else None

    def resolved(self, text: str) -> str:
        return resolve(text, self.root, self.env, self.name, self.data_root)


def placed(spec: TaskSpec, storage: Storage) -> tuple[TaskSpec, list[Problem]]:
    """The task with its `data_root` and `store_options`, and every problem of its places."""
    data_root, problems = _data_root(spec, storage)
    if problems:
        return spec, problems
    spec = replace(spec, data_root=data_root)
    named, file = (spec.task.inputs | spec.task.outputs).items(), spec.file_name
    problems = [each for field in named for each in _unresolved(spec, file, *field)]
    if problems := problems or list(_misplaced_outputs(spec)):
        return spec, problems
    places = {place: spec.resolved(text) for place, text in spec.task.inputs.items()}
    places |= output_folders(spec) | {"": spec.journal_folder}
    if storage.problems and any(map(is_uri, places.values())):
        return spec, list(storage.problems)
    options, problems = store_options(storage, spec.env, places, spec.file_name)
    return replace(spec, store_options=options, storage=storage.file), problems


def relative_places(spec: TaskSpec) -> dict[str, str]:
    """Where relative data folders lie, by field, if that is not the project root."""
    if spec.data_root in (None, str(spec.root)):
        return {}
    return {place: spec.resolved(text) for place, text in _relative(spec).items()}


def _relative(spec: TaskSpec) -> dict[str, str]:
    """Folders as written, by field, that are neither URIs nor start with `/` or `./`."""
    found: dict[str, str] = {}
    for place, text in (spec.task.inputs | spec.task.outputs).items():
        with suppress(MissingVariable):  # a problem of the folder
            if is_relative(spec.env.expand(text)):
                found[place] = text
    return found


def _data_root(spec: TaskSpec, storage: Storage) -> tuple[str | None, list[Problem]]:
    """Resolved; None is the project root. What is wrong with it concerns who needs it only."""
    text, file = spec.task.data_root, spec.file_name
    if text is None:
        text, file = storage.file.data_root, STORAGE_FILE
        if not _relative(spec) or (storage.root_is_known and text is None):
            return None, []
    problems = _unresolved(spec, file, "data_root", text) if text else list(storage.problems)
    return spec.resolved(text) if text and not problems else None, problems


def _unresolved(spec: TaskSpec, file: str, place: str, text: str) -> list[Problem]:
    """What keeps a folder from being resolved. What the project's file names may be nothing to a
    task: there a variable that is not set is no mistake."""
    expander = Expander(spec.env, file)
    try:
        spec.resolved(text)
    except MissingVariable as error:
        wrong = f"variable {error.name} is not set"
        if file == STORAGE_FILE:
            expander.unready(place, wrong, f"${{{error.name}}} has a value")
        else:
            expander.problems.append(Problem(file, place, wrong, have=text))
    except PydanticCustomError as error:
        expander.problems.append(problem_of(error, file, place, text))
    return expander.problems


def output_folders(spec: TaskSpec) -> dict[str, str]:
    """Resolved, with that of the preprocessed rows, which may be named nowhere."""
    folders = {place: spec.resolved(text) for place, text in spec.task.outputs.items()}
    for stage, folder in spec.task.stage_folders.items():
        if folder is None:
            folders["preprocess.output_folder"] = spec.folder(stage)
    return folders | ({"logging.log_dir": str(spec.log_folder)} if spec.log_folder else {})


def unwritable(spec: TaskSpec) -> Iterator[Problem]:
    """Output folders of this machine that this process may not write to."""
    for place, folder in output_folders(spec).items():
        if not is_uri(folder) and not os.access(found := _nearest(folder), os.W_OK | os.X_OK):
            wrong, have = "cannot be written to", str(found)
            fix = "choose another folder, or let this user write to it"
            yield Problem(spec.file_name, place, wrong, have=have, fix=fix, unready=True)


def _nearest(folder: str) -> Path:
    """What there is of a folder on this machine: itself or the first above it."""
    path = Path(folder)
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), path)


def _misplaced_outputs(spec: TaskSpec) -> Iterator[Problem]:
    """An output below the input would be taken for new input; one beside a bucket is in another;
    and nothing can lie below a file."""
    folders = output_folders(spec)
    if None in spec.task.stage_folders.values() and is_bucket(spec.input_folder):
        wrong, fix = "missing: the input is a whole bucket", "name a folder for it"
        yield Problem(spec.file_name, "preprocess.output_folder", wrong, fix=fix)
    for place, folder in folders.items():
        if is_within(folder, spec.input_folder):
            wrong = "the folder lies in the input folder, so outputs would become inputs"
            yield Problem(spec.file_name, place, wrong, fix="choose a folder beside it")
        elif not is_uri(folder) and not (found := _nearest(folder)).is_dir():
            wrong = "a file stands there" if found.exists() else "a link to nothing stands there"
            have, fix = shown_place(str(found), spec.root), "choose another folder, or move it away"
            yield Problem(spec.file_name, place, wrong, "a folder", have, fix)


def store_options(
    storage: Storage, env: Environment, places: Mapping[str, str], file: str
) -> tuple[tuple[StoreOptions, ...], list[Problem]]:
    """What reaches those of the resolved places that are URIs, the longest prefix first, and what
    is missing. `places` are by their fields in `file`."""
    found: dict[str, StoreOptions] = {}
    problems: list[Problem] = []
    for place_field, place in places.items():
        if not is_uri(place):
            continue
        fits = [(n, p) for n, p in storage.file.stores.items() if f"{place}/".startswith(p.prefix)]
        usual = "", StoreProfile(prefix=f"{place.partition('://')[0]}://")
        name, profile = max(fits, key=lambda each: len(each[1].prefix), default=usual)
        prefix, filesystem = profile.prefix, profile.filesystem
        if prefix in found:
            continue
        where = (STORAGE_FILE, f"stores.{name}") if name else (file, place_field)
        resolver = _Resolver(env, *where)
        options = resolver.expanded(profile.options, f"{resolver.block}.options")
        if filesystem == "s3":
            options = _joined(resolver.s3(profile), options)
        label, secrets = name or f"no profile in {STORAGE_FILE}", tuple(resolver.secrets)
        found[prefix] = StoreOptions(label, prefix, filesystem, options, secrets)
        problems += resolver.problems
    return tuple(sorted(found.values(), key=lambda each: -len(each.prefix))), problems


@dataclass
class _Resolver(Expander):
    """Fills in a profile; what it leaves out is taken from variables of the environment."""

    block: str
    """Where the profile stands in its file; without one, the field that names the store."""
    secrets: list[str] = field(default_factory=list[str], kw_only=True)
    """What options take from the environment."""

    def expanded(self, value: Any, place: str) -> Any:
        """An option, with references replaced however deep they are."""
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            return {name: self.expanded(v, f"{place}.{name}") for name, v in fields.items()}
        if isinstance(value, list):
            items = cast("list[Any]", value)
            return [self.expanded(v, f"{place}[{number}]") for number, v in enumerate(items)]
        if not isinstance(value, str) or not REFERENCE.search(value):
            return value
        expanded = self._optional(place, value)
        if expanded is not None:
            self.secrets += in_url(expanded) if "://" in expanded else [expanded]
        return expanded

    def s3(self, profile: StoreProfile) -> dict[str, Any]:
        """Arguments of the file system for S3; TOS always has an endpoint and a region."""
        is_tos = profile.prefix.startswith("tos://")
        endpoint = self._optional(f"{self.block}.endpoint", profile.endpoint, checked_endpoint)
        region = self._optional(f"{self.block}.region", profile.region)
        names = ("TOS_ENDPOINT",) if is_tos else ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        endpoint = endpoint or self._variable(*names, check=checked_endpoint)
        names = ("REGION",) if is_tos else ("AWS_REGION", "AWS_DEFAULT_REGION")
        region = region or self._variable(*names)
        tos_host = TOS_HOST.fullmatch(endpoint or "")
        if is_tos:
            region = region or (tos_host["region"].lower() if tos_host else "cn-beijing")
            endpoint = endpoint or f"https://tos-s3-{region}.volces.com"
        addressing = profile.addressing
        if addressing == "auto" and (is_tos or tos_host):
            # The bucket is part of the host name, which an address in numbers cannot have.
            addressing = "path" if _is_address(endpoint or "") else "virtual"
        config: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": profile.max_attempts},
            "connect_timeout": 10,
            "read_timeout": 60,
            "s3": {"addressing_style": addressing},
        }
        options: dict[str, Any] = {**self._keys(profile, is_tos), "config_kwargs": config}
        if endpoint:  # other stores than Amazon's know no newer checksums
            config["signature_version"] = "s3v4"
            config["request_checksum_calculation"] = "when_required"
            config["response_checksum_validation"] = "when_required"
            options["endpoint_url"] = endpoint
        if region:
            options["client_kwargs"] = {"region_name": region}
        return options

    def _keys(self, profile: StoreProfile, is_tos: bool) -> dict[str, str | None]:
        """Those of the profile; else those of the environment, else none."""
        if profile.options.get("anon") is True:
            return {}
        if profile.access_key:
            return {
                "key": self.text(f"{self.block}.access_key", profile.access_key),
                "secret": self.text(f"{self.block}.secret_key", profile.secret_key),
                "token": self._optional(f"{self.block}.session_token", profile.session_token),
            }
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        names = ("TOS_ACCESS_KEY", "TOS_SECRET_KEY", "") if is_tos else names
        missing = [name for name in names[:2] if not self.env.get(name)]
        if len(missing) == 1 or (missing and is_tos):
            scheme = "tos://" if is_tos else "s3://"
            are, needed = "variable {} is", "there is a value"
            if len(missing) > 1:
                are, needed = "variables {} are", "there are values"
            wrong = f"{are.format(' and '.join(missing))} not set, which {scheme} needs"
            more = f", or a profile for {scheme} in {STORAGE_FILE}"
            self.unready(self.block, wrong, needed, more if self.file != STORAGE_FILE else "")
        found = zip(("key", "secret", "token"), map(self.env.get, names), strict=True)
        return {} if missing else {option: value for option, value in found if value}

    def _optional(self, place: str, text: str | None, check: Check = str) -> str | None:
        """None, too, for `${NAME:-}` without a value: the file says that there may be none."""
        if text and is_reference(text) and text.endswith(":-}") and not self.env.expand(text):
            return None
        return self.text(place, text, check)

    def _variable(self, *names: str, check: Check = str) -> str | None:
        """The value of the first one that is set."""
        name = next((name for name in names if self.env.get(name)), None)
        return self.text(self.block, f"${{{name}}}", check) if name else None


def _is_address(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def _joined(made: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The user's options win; in a mapping of both they win by its keys."""
    both = {
        name: _joined(made[name], own[name])
        for name in made.keys() & own.keys()
        if isinstance(made[name], dict) and isinstance(own[name], dict)
    }
    return {**made, **own, **both}
