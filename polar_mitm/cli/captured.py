"""What a harness prints, in bounded memory however much it prints."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager


class Captured:
    """A descriptor to write to, `fd`, and the end of what was written."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = bytearray()
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # Not `connect_read_pipe`: uvloop's closes the descriptor twice; another thread may have its number
        # by then.
        self._ours, self.fd = os.pipe()
        os.set_blocking(self._ours, False)
        self._loop.add_reader(self._ours, self._read)

    async def text(self) -> str:
        """The last `limit` bytes, once nobody but us has `fd`, which is closed."""
        self._close_theirs()
        await self._ended.wait()
        return self._kept[-self._limit :].decode(errors="replace")

    def close(self) -> None:
        self._close_theirs()
        self._loop.remove_reader(self._ours)
        os.close(self._ours)

    def _close_theirs(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _read(self) -> None:
        try:
            chunk = os.read(self._ours, 1 << 16)
        except BlockingIOError:
            return
        self._kept += chunk
        if len(self._kept) > 2 * self._limit:
            del self._kept[: -self._limit]
        if not chunk:
            self._loop.remove_reader(self._ours)
            self._ended.set()


@contextmanager
def captured(limit: int) -> Iterator[Captured]:
    """The last `limit` bytes of what is written to a pipe."""
    pipe = Captured(limit)
    try:
        yield pipe
    finally:
        pipe.close()
