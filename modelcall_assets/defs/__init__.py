"""The asset graph: the only folder that knows Dagster. Here all tasks of a project become one
Definitions object."""

import os
import warnings
from pathlib import Path

import dagster as dg

from modelcall_assets.config.catalog import (
    BrokenTask,
    Catalog,
    find_root,
    load_catalog,
    load_linked,
)
from modelcall_assets.defs.assets import model_resources, task_assets
from modelcall_assets.defs.runs import housekeeping_sensor, locked_executor, task_job
from modelcall_assets.defs.sensors import task_sensors
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.stages.task import Task


def definitions_of(path: Path | str) -> dg.Definitions:
    """Of a project's folder, or one of its task files: assets, jobs, sensors, model resources and
    the executor, for a code location of your own. A broken file of a folder becomes an asset that
    says what is wrong; one that was asked for is a SetupError, and so is a path in no project."""
    path, root = Path(path).resolve(), find_root(Path(path))
    if path.is_dir():
        return project_definitions(load_catalog(root))
    return project_definitions(Catalog((load_linked(path, root),), ()))


def project_definitions(catalog: Catalog) -> dg.Definitions:
    """Loads whatever the state of single task files; an LLM asset runs in the process of its run,
    because its concurrency is asyncio's."""
    # The sensors launch one file a run, or one stage: that neighbours have different backfill
    # policies does not concern them.
    warnings.filterwarnings("ignore", message=r"Asset job __anonymous_asset_job_\w+ materializes")
    assets: list[dg.AssetsDefinition | dg.AssetSpec] = [*map(_broken_asset, catalog.broken)]
    sensors: list[dg.SensorDefinition] = []
    tasks: list[Task] = []
    for spec in catalog.tasks:
        try:
            task = Task(spec)
            if (absent := _waits_for(task)) is not None:
                raise SetupError([absent])
            assets += task_assets(task)
        except SetupError as error:  # as a scorer that cannot be imported
            broken = BrokenTask(spec.path, spec.file_name, spec.key, error.problems)
            assets.append(_broken_asset(broken, spec.task.description))
        else:
            sensors += task_sensors(task)
            tasks.append(task)
    sensors.append(housekeeping_sensor([task.spec for task in tasks]))
    return dg.Definitions(
        assets=assets,
        jobs=[*map(task_job, tasks)],
        sensors=sensors,
        resources=model_resources(tasks),
        executor=locked_executor,
    )


def _waits_for(task: Task) -> Problem | None:
    """An input that was never there; what reads another task's output waits with that one."""
    state = task.layout.state_folder
    if isinstance(state, Path) and os.access(state, os.F_OK):
        return None
    return task.absent_input if task.linked is None else _waits_for(task.linked.task)


def _broken_asset(task: BrokenTask, about: str = "") -> dg.AssetSpec:
    """A stub in the graph that says what is wrong with a task file, or what it waits for."""
    listed = "\n".join(f"- `{problem}`" for problem in task.problems)
    only_waits = all(problem.unready for problem in task.problems)
    group = "configs_that_wait" if only_waits else "broken_configs"
    verdict = "cannot run here yet" if only_waits else "cannot be loaded"
    remedy = "Bring what it waits for" if only_waits else "Mend it"
    return dg.AssetSpec(
        dg.AssetKey([group, task.key]),
        description=(
            f"**{task.file_name} {verdict}.** {remedy}, then reload definitions; "
            f"`modelcall check` prints the same:\n\n{listed}\n\n{about}"
        ),
        group_name=group,
        kinds={"yaml"},
        metadata={"task_file": task.file_name, "problems": dg.MetadataValue.md(listed)},
        tags={"modelcall/broken": "true"},
    )
