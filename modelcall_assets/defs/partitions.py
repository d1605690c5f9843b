"""Partition keys of a task: its input files, and its merge groups."""

from collections.abc import Sequence

import dagster as dg
from sqlalchemy.exc import IntegrityError

from modelcall_assets.config.catalog import TaskSpec
from modelcall_assets.steps.task_steps import GROUPS, TaskSteps


def files_of(spec: TaskSpec) -> dg.DynamicPartitionsDefinition:
    return dg.DynamicPartitionsDefinition(name=f"{spec.key}/files")


def groups_of(spec: TaskSpec) -> dg.DynamicPartitionsDefinition:
    return dg.DynamicPartitionsDefinition(name=f"{spec.key}/groups")


def partitions_of(steps: TaskSteps, stage: str) -> dg.DynamicPartitionsDefinition:
    """The task's own, or those of the task whose files it reads."""
    owner = steps.partitions_owner(stage).spec
    return groups_of(owner) if steps.partitions(stage) == GROUPS else files_of(owner)


def add_new_files(instance: dg.DagsterInstance, steps: TaskSteps) -> list[str]:
    """Make every input file, and every merge group, a partition; gives the keys that the first
    stage has, in order."""
    for stage in {steps.partitions(stage): stage for stage in steps.stages}.values():
        keys = steps.keys(steps.partitions(stage))
        add_partitions(instance, partitions_of(steps, stage), keys)
    return steps.keys(steps.partitions(steps.stages[0]))


def add_partitions(
    instance: dg.DagsterInstance,
    partitions: dg.DynamicPartitionsDefinition,
    keys: Sequence[str],
) -> None:
    """Those that are not there yet. Dagster looks and then adds, so that another process may have
    added some in between."""
    name = partitions.name
    assert name is not None
    while True:
        known = set(instance.get_dynamic_partitions(name))
        new = [key for key in keys if key not in known]
        try:
            if new:
                instance.add_dynamic_partitions(name, new)
        except IntegrityError:
            continue
        return
