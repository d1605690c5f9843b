"""Partitions that are splits of data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from modelcall_assets.config.datasets import DatasetConfig, output_name
from modelcall_assets.config.spec import RAW
from modelcall_assets.errors import InputError, SetupError
from modelcall_assets.records.keys import encode_key
from modelcall_assets.steps.inputs import Inputs
from modelcall_assets.steps.members import as_one
from modelcall_assets.storage.datasets import Split, dataset_path, find_split, find_splits
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.places import Place


@dataclass(frozen=True, slots=True)
class SplitPlace:
    """Which split of which data set a partition is."""

    dataset: str
    path: Place
    config: str | None
    split: str


@dataclass(frozen=True)
class SplitInputs(Inputs):
    """Every split of some data sets, by the path of its output."""

    datasets: Mapping[str, DatasetConfig]
    with_system: bool

    def files(self) -> list[FileInfo]:
        """With a stand-in for a data set that cannot be read, whose members say why; InputError
        when none can be."""
        return [as_one(name, split.files) for name, (_, split) in self._splits().items()]

    def all_keys(self) -> set[str]:
        found = self._splits().items()
        return {encode_key(name) for name, (_, split) in found if split.files[0].version != _ABSENT}

    def members(self, key: str) -> Sequence[FileInfo]:
        place = self.place(key)
        return find_split(place.path, place.config, place.split).files

    def place(self, key: str) -> SplitPlace:
        """InputError when it is gone."""
        if key not in self._places:
            folder = self.layout.folder(RAW)
            raise InputError(f"{folder}: there is no split for '{key}' any more")
        return self._places[key]

    @cached_property
    def _places(self) -> dict[str, SplitPlace]:
        return {encode_key(name): place for name, (place, _) in self._splits().items()}

    def _splits(self) -> dict[str, tuple[SplitPlace, Split]]:
        found: dict[str, tuple[SplitPlace, Split]] = {}
        for name, dataset in self.datasets.items():
            path = dataset_path(self.layout.folder(RAW), name)
            for split in _splits_of(path, dataset.configs):
                place = SplitPlace(name, path, split.config, split.split)
                output = output_name(name, split.config, split.split, self.with_system)
                first, _ = found.setdefault(output, (place, split))
                if first != place:
                    raise SetupError([self.shared(first.dataset, name, output)])
        if all(split.files[0].version == _ABSENT for _, split in found.values()):
            for place, _ in found.values():
                find_splits(place.path, [place.config])
        return dict(list(found.items())[: self.most])


_ABSENT = "absent"
"""The version of what is not there."""


def _splits_of(path: Place, configs: Sequence[str | None]) -> list[Split]:
    """What cannot be found is one that has the path where it was looked for."""
    try:
        return find_splits(path, configs)
    except InputError:
        if len(configs) > 1:
            return [split for config in configs for split in _splits_of(path, [config])]
        return [Split(configs[0], "train", (FileInfo(path.name, path, 0, _ABSENT),))]
