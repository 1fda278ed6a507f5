"""Which weights the engine has, where somebody else updates them: it is asked once a second.

Our own trainer says it itself (`Capture.policy_changed`), at the very moment. Whoever else updates an engine
is noticed up to a second late, so that a call's versions may be older than the truth, never newer: what is
too stale to be trained on is never taken for fresh. An engine that told the probe no version is not asked.
"""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import msgspec

from polar_mitm_addons.capture import Capture

PERIOD_S = 1.0


class _Answer(msgspec.Struct):
    weight_version: str


class WeightsWatch:
    """From `start` to `close`, keeps a capture's policy version what the engine says."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, unless it has begun or the engine's weights stay as they are."""
        if self._task is None and self._capture.engine.weight_version:
            self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            before = self._capture.engine
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
                version = await self._ask()
                # An answer that was overtaken by an update of ours is an old one.
                if version and before is self._capture.engine and version != before.policy_version:
                    self._capture.policy_changed(version)
            await asyncio.sleep(PERIOD_S)

    async def _ask(self) -> str | None:
        timeout = aiohttp.ClientTimeout(total=10 * PERIOD_S)
        url = f"{self._capture.engine.url}/weight_info"
        async with self._capture.http.get(url, timeout=timeout) as response:
            if response.status != 200:
                return None
            return msgspec.json.decode(await response.read(), type=_Answer).weight_version
