"""What has to happen now and then wherever Dagster's daemon runs."""

from collections.abc import Sequence

import dagster as dg

from modelcall_assets.config.catalog import TaskSpec
from modelcall_assets.defs.dead_runs import end_dead_runs

EVERY_S = 30


def task_pool(spec: TaskSpec) -> str:
    """Limits how many runs of a task score at a time; an endpoint's own limits are kept by the
    engines that share it."""
    return spec.key


def housekeeping_sensor(specs: Sequence[TaskSpec]) -> dg.SensorDefinition:
    """Ends dead runs, and gives each task's pool its slots."""
    wanted = {task_pool(spec): spec.task.concurrency.max_concurrent_files for spec in specs}

    @dg.sensor(
        name="housekeeping",
        description="Ends runs whose process was killed, so that they hold nothing up, and lets "
        "as many runs of a task go on at a time as its max_concurrent_files says.",
        minimum_interval_seconds=EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        done = [f"ended dead run {run_id}" for run_id in end_dead_runs(context.instance)]
        done += [f"pool {name}: {n} slots" for name, n in set_slots(context.instance, wanted)]
        return dg.SkipReason("; ".join(done) or "nothing to do")

    return sensor


def set_slots(instance: dg.DagsterInstance, wanted: dict[str, int]) -> list[tuple[str, int]]:
    """Change the pools that have another number of slots; gives which."""
    storage = instance.event_log_storage
    now = {pool.name: pool.limit for pool in storage.get_pool_limits() if not pool.from_default}
    changed = [(name, slots) for name, slots in wanted.items() if now.get(name) != slots]
    for name, slots in changed:
        storage.set_concurrency_slots(name, slots)
    return changed
