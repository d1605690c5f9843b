"""All tasks of a project as one Definitions object; a broken file shows instead of breaking."""

import dagster as dg

from modelcall_assets.config.catalog import BrokenTask, Catalog, TaskSpec
from modelcall_assets.defs.assets import task_assets
from modelcall_assets.steps.progress import Watcher

BROKEN = "broken_configs"


def project_definitions(catalog: Catalog) -> dg.Definitions:
    """Loads whatever the state of single task files; an LLM asset runs in the process of its run,
    because its concurrency is asyncio's."""
    assets = [asset for spec in catalog.tasks for asset in task_assets(spec)]
    broken = [broken_asset(task) for task in catalog.broken]
    return dg.Definitions(assets=[*assets, *broken], executor=dg.in_process_executor)


def task_definitions(spec: TaskSpec, watcher: Watcher | None = None) -> dg.Definitions:
    """One task's graph, the same as in the project's."""
    return dg.Definitions(assets=task_assets(spec, watcher), executor=dg.in_process_executor)


def broken_asset(task: BrokenTask) -> dg.AssetSpec:
    """A stub in the graph that says what is wrong with a task file."""
    listed = "\n".join(f"- `{problem}`" for problem in task.problems)
    return dg.AssetSpec(
        dg.AssetKey([BROKEN, task.key]),
        description=(
            f"**{task.file_name} cannot be loaded.** Mend it, then reload definitions. "
            f"`modelcall check {task.file_name}` prints the same:\n\n{listed}"
        ),
        group_name=BROKEN,
        kinds={"yaml"},
        metadata={"task_file": task.file_name, "problems": dg.MetadataValue.md(listed)},
        tags={"modelcall/broken": "true"},
    )
