"""A recorder in memory, whose durability a test may hold back."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path

import msgspec

from polar_mitm.types import EgressEvent, ModelCall, Rollout


class MemoryRecorder:
    """What the addons need of a `Recorder`. With `hold`, `call`'s futures stay open until the test's word."""

    def __init__(self) -> None:
        self.found: frozenset[str] = frozenset()
        self.path = Path("memory")
        self.hold = False
        self.fail: str | None = None
        self.calls: list[ModelCall] = []
        self.held: list[Future[bool]] = []
        self.rollouts: list[Rollout] = []
        self.events: list[EgressEvent] = []
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def call(self, call: ModelCall) -> Future[bool]:
        self.calls.append(call)
        future: Future[bool] = Future()
        self.held.append(future)
        if not self.hold:
            future.set_result(self.fail is None)
        self._notify()
        return future

    def flush(self) -> None:
        pass

    def rollout(self, rollout: Rollout) -> Future[bool]:
        self.rollouts.append(msgspec.structs.replace(rollout))
        future: Future[bool] = Future()
        future.set_result(True)
        return future

    def egress(self, event: EgressEvent) -> None:
        self.events.append(event)
        self._notify()

    def incomplete(self, rollout_id: str) -> str | None:
        return self.fail

    async def until_calls(self, count: int) -> list[ModelCall]:
        """Wait until there are `count` calls."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: len(self.calls) >= count), 30)
        return self.calls

    async def until_events(self, count: int) -> list[EgressEvent]:
        """Wait until there are `count` egress events."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: len(self.events) >= count), 30)
        return self.events

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
