"""The event loop that interceptors run on: uvloop, which halves what a call costs."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from polar_mitm.cli.exits import Interrupted

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on uvloop. Ctrl-C and SIGTERM cancel `main`, which may then end in good order.

    Raises:
        Interrupted: one of them came.
    """
    import uvloop

    came: list[int] = []

    async def stoppable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(number: int) -> None:
            came.append(number)
            task.cancel()

        for number in _SIGNALS:
            loop.add_signal_handler(number, stop, number)
        return await main

    # A call makes thousands of objects, nearly all freed by their counts: looking for cycles among everything
    # that was ever imported, after each 700 of them, took a fifth of a call.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        return uvloop.run(stoppable())
    except asyncio.CancelledError:
        if not came:
            raise
        raise Interrupted(came[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
