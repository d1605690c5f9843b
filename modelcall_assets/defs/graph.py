"""Keys, partitions, code versions and provenance: what makes the UI say "unsynced", and only that.

Dagster sets provenance on results that a body yields, not on logged materialisations; these tags
are the ones it would set. `tests/test_assets.py` checks both ways against the installed release.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import dagster as dg
from sqlalchemy.exc import IntegrityError

from modelcall_assets.stages.stage import Keys, Stage
from modelcall_assets.stages.task import Task


def partitions_of(keys: Keys) -> dg.DynamicPartitionsDefinition:
    return dg.DynamicPartitionsDefinition(name=keys.name)


def add_new_keys(instance: dg.DagsterInstance, task: Task) -> list[str]:
    """Make every input file, and every merge group, a partition; gives the keys that the first
    stage has, in order."""
    now = {keys.name: keys.now() for keys, _ in task.stages_by_keys()}
    for name, keys in now.items():
        add_partitions(instance, name, keys)
    return now[task.stages[0].keys.name]


def add_partitions(instance: dg.DagsterInstance, name: str, keys: Sequence[str]) -> None:
    """Those that are not there yet. Dagster looks and then adds, so that another process may have
    added some in between."""
    while True:
        known = set(instance.get_dynamic_partitions(name))
        new = [key for key in keys if key not in known]
        try:
            if new:
                instance.add_dynamic_partitions(name, new)
        except IntegrityError:
            continue
        return


_CODE = "dagster/code_version"
_DATA = "dagster/data_version"


def asset_key(stage: Stage) -> dg.AssetKey:
    return dg.AssetKey([stage.spec.key, stage.name])


def code_version(stage: Stage) -> str:
    """Digest of what of the task's files shapes the rows."""
    shape = json.dumps(stage.shape(), sort_keys=True, default=str)
    return hashlib.sha256(shape.encode()).hexdigest()[:12]


def provenance_tags(
    instance: dg.DagsterInstance, stage: Stage, key: str, data_version: str
) -> dict[str, str]:
    """Tags of a materialisation that is logged instead of yielded."""
    tags = {
        _CODE: code_version(stage),
        _DATA: data_version,
        f"{_DATA}_is_user_provided": "true",
    }
    if stage.upstream is None:
        return tags
    asset = asset_key(stage.upstream)
    record = instance.get_latest_data_version_record(asset, partition_key=key)
    if record is not None:
        name = asset.to_user_string()
        tags[f"dagster/input_data_version/{name}"] = _as_input(record.event_log_entry.tags)
        tags[f"dagster/input_event_pointer/{name}"] = str(record.storage_id)
    return tags


def is_stale(instance: dg.DagsterInstance, stage: Stage, key: str) -> bool:
    """Whether a materialised partition was made by other code or from other upstream content."""
    made = _latest_tags(instance, stage, key)
    if made.get(_CODE) != code_version(stage):
        return True
    if stage.upstream is None or stage.gathers:
        return stage.members_changed(key)
    used = made.get(f"dagster/input_data_version/{asset_key(stage.upstream).to_user_string()}")
    return used != _as_input(_latest_tags(instance, stage.upstream, key))


def _as_input(tags: Mapping[str, str] | None) -> str:
    """The upstream version as Dagster notes it: a digest over those of the partitions read, here
    one, or none when somebody only reported the materialisation."""
    return hashlib.sha256((tags or {}).get(_DATA, "").encode()).hexdigest()


def _latest_tags(instance: dg.DagsterInstance, stage: Stage, key: str) -> Mapping[str, str]:
    record = instance.get_latest_data_version_record(asset_key(stage), partition_key=key)
    return (record.event_log_entry.tags or {}) if record is not None else {}
