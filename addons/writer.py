"""A stream writer that sends what one turn of the event loop wrote in one system call.

mitmproxy writes the head of an answer, its first bytes, and the end of a chunked body one by one; over TLS on
loopback each of those writes costs as much as translating the whole answer.
"""

from __future__ import annotations

import asyncio
from typing import Any


class CoalescingWriter:
    """Wraps an `asyncio.StreamWriter`; only `write` is different, and whatever has to come after it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._pending: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.append(data)

    async def drain(self) -> None:
        self._flush()
        await self._writer.drain()

    def write_eof(self) -> None:
        self._flush()
        self._writer.write_eof()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            data, self._pending = b"".join(self._pending), []
            if not self._writer.is_closing():
                self._writer.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
