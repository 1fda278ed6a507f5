"""The event loop that interceptors run on: uvloop, which halves what a call costs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from polar_mitm.cli.exits import Terminated

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on uvloop, where SIGTERM ends `main` as Ctrl-C does: by cancelling it.

    Raises:
        KeyboardInterrupt: either of the two came.
    """
    import uvloop

    async def stoppable() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await main

    before = signal.getsignal(signal.SIGTERM)
    try:
        return uvloop.run(stoppable())
    except asyncio.CancelledError:
        raise Terminated from None
    finally:
        signal.signal(signal.SIGTERM, before)
