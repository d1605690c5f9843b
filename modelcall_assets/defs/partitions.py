"""Partition keys in Dagster: the sets of keys that a task's stages have."""

from collections.abc import Sequence

import dagster as dg
from sqlalchemy.exc import IntegrityError

from modelcall_assets.stages.stage import Keys
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
