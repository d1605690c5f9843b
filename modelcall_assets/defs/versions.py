"""Code versions, provenance and staleness: what makes the UI say "unsynced", and only that.

Dagster sets provenance on results that a body yields, not on logged materialisations; these tags
are the ones it would set. `tests/test_assets.py` checks both ways against the installed release.
"""

import hashlib
import json
from collections.abc import Mapping

import dagster as dg

from modelcall_assets.config.spec import MERGED, TaskSpec
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.steps.upstream import Upstream

_CODE = "dagster/code_version"
_DATA = "dagster/data_version"


def code_version(steps: TaskSteps, stage: str) -> str:
    """Digest of what of the task's files shapes the rows of a stage."""
    shape = json.dumps(steps.shape(stage), sort_keys=True, default=str)
    return hashlib.sha256(shape.encode()).hexdigest()[:12]


def provenance_tags(
    instance: dg.DagsterInstance, steps: TaskSteps, stage: str, key: str, data_version: str
) -> dict[str, str]:
    """Tags of a materialisation that is logged instead of yielded."""
    tags = {
        _CODE: code_version(steps, stage),
        _DATA: data_version,
        f"{_DATA}_is_user_provided": "true",
    }
    upstream = steps.upstream_of(stage)
    if upstream is None:
        return tags
    asset = upstream_key(upstream)
    record = instance.get_latest_data_version_record(asset, partition_key=key)
    if record is not None:
        name = asset.to_user_string()
        tags[f"dagster/input_data_version/{name}"] = _as_input(record.event_log_entry.tags)
        tags[f"dagster/input_event_pointer/{name}"] = str(record.storage_id)
    return tags


def is_stale(instance: dg.DagsterInstance, steps: TaskSteps, stage: str, key: str) -> bool:
    """Whether a materialised partition was made by other code or from other upstream content."""
    made = _latest_tags(instance, asset_key(steps.spec, stage), key)
    if made.get(_CODE) != code_version(steps, stage):
        return True
    upstream = steps.upstream_of(stage)
    if upstream is None:
        return False
    if stage == MERGED:
        return steps.members_changed(key)
    used = made.get(f"dagster/input_data_version/{upstream_key(upstream).to_user_string()}")
    return used != _as_input(_latest_tags(instance, upstream_key(upstream), key))


def asset_key(spec: TaskSpec, stage: str) -> dg.AssetKey:
    return dg.AssetKey([spec.key, stage])


def upstream_key(upstream: Upstream) -> dg.AssetKey:
    return asset_key(upstream.layout.spec, upstream.stage)


def _as_input(tags: Mapping[str, str] | None) -> str:
    """The upstream version as Dagster notes it: a digest over those of the partitions read, here
    one, or none when somebody only reported the materialisation."""
    return hashlib.sha256((tags or {}).get(_DATA, "").encode()).hexdigest()


def _latest_tags(instance: dg.DagsterInstance, asset: dg.AssetKey, key: str) -> Mapping[str, str]:
    record = instance.get_latest_data_version_record(asset, partition_key=key)
    return (record.event_log_entry.tags or {}) if record is not None else {}
