"""The event loop that interceptors run on: uvloop, which halves what a call costs."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on uvloop."""
    import uvloop

    return uvloop.run(main)
