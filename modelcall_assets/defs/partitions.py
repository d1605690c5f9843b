"""Partition keys of a task: its input files."""

import dagster as dg

from modelcall_assets.config.catalog import TaskSpec
from modelcall_assets.records.keys import encode_key
from modelcall_assets.steps.task_steps import TaskSteps


def files_of(spec: TaskSpec) -> dg.DynamicPartitionsDefinition:
    return dg.DynamicPartitionsDefinition(name=f"{spec.key}/files")


def add_new_files(instance: dg.DagsterInstance, steps: TaskSteps) -> list[str]:
    """Make every input file a partition; gives the keys of all files present, in file order."""
    keys = [encode_key(file.key_path) for file in steps.inputs()]
    name = files_of(steps.spec).name
    assert name is not None
    known = set(instance.get_dynamic_partitions(name))
    if new := [key for key in keys if key not in known]:
        instance.add_dynamic_partitions(name, new)
    return keys
