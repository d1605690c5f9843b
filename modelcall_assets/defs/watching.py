"""Tell whoever watches how a run goes, while it goes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import dagster as dg

from modelcall_assets.steps.progress import Tally, Watcher


@asynccontextmanager
async def watched(
    context: dg.AssetExecutionContext,
    watcher: Watcher | None,
    stage: str,
    *,
    asks_model: bool = True,
) -> AsyncGenerator[Tally]:
    """A tally of the run; without a watcher of its own it is logged every 30 s."""
    tally = Tally(stage, asks_model)
    shown_to = watcher or Watcher(lambda tally: context.log.info(tally.line()))

    async def show() -> None:
        while True:
            await asyncio.sleep(shown_to.every_s)
            shown_to.show(tally)

    task = asyncio.create_task(show())
    try:
        yield tally
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        shown_to.show(tally)
