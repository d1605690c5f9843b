"""Tell whoever watches how a run goes, while it goes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import dagster as dg

from modelcall_assets.stages.progress import Tally, Watcher


@asynccontextmanager
async def watched(
    context: dg.AssetExecutionContext, watcher: Watcher | None, tally: Tally
) -> AsyncGenerator[None]:
    """Without a watcher of its own it is logged every 30 s."""
    shown_to = watcher or Watcher(lambda tally: context.log.info(tally.line()))

    async def show() -> None:
        while True:
            await asyncio.sleep(shown_to.every_s)
            shown_to.show(tally)

    task = asyncio.create_task(show())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        shown_to.show(tally)
