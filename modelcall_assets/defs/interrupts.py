"""Ctrl-C and SIGTERM in a run: stop sending, wait a while for the replies in flight, then end.

Dagster's own handler raises wherever the main thread is at that moment. Inside a callback of the
event loop that is only logged, and the run would go on.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

GRACE_S = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@asynccontextmanager
async def interruptible(stop: Callable[[], None]) -> AsyncGenerator[None]:
    """A signal calls `stop`, and the block ends in KeyboardInterrupt; a second one does not wait
    for what is in flight."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task, came = asyncio.get_running_loop(), asyncio.current_task(), list[int]()
    assert task is not None

    def on_signal(number: int) -> None:
        came.append(number)
        stop()
        timers.append(loop.call_later(GRACE_S if len(came) == 1 else 0, task.cancel))

    timers: list[asyncio.TimerHandle] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    except BaseException:
        if not came:
            raise
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
