"""An engine whose every byte waits for the test that holds it.

async with HeldEngine() as engine:
    generation = await engine.next()          # a request has come
    generation.send(event)                    # one chunk of the stream
    generation.finish()                       # or `.break_off()`; `.gone` is set when the client hangs up
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Self, cast

DEADLINE_S = 30
"""Against hangs; nothing here takes a hundredth of it."""


class Generation:
    """One request to the engine, and the way to answer it."""

    def __init__(self, transport: asyncio.Transport, path: str, body: bytes) -> None:
        self._transport = transport
        self._headed = False
        self.path = path
        self.body: dict[str, Any] = json.loads(body or b"{}")
        self.gone = asyncio.Event()

    def head(self, status: int = 200, headers: str = "content-type: text/event-stream\r\n") -> None:
        self._headed = True
        self.raw(f"HTTP/1.1 {status} X\r\n{headers}transfer-encoding: chunked\r\n\r\n".encode())

    def send(self, *chunks: bytes) -> None:
        """Chunks of the body, the head first where it has not gone yet."""
        if not self._headed:
            self.head()
        for chunk in chunks:
            self.raw(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def finish(self, *chunks: bytes) -> None:
        """The last chunks and the end of the answer."""
        self.send(*chunks)
        self.raw(b"0\r\n\r\n")

    def raw(self, data: bytes) -> None:
        """Any bytes at all."""
        self._transport.write(data)

    def break_off(self) -> None:
        """Close the connection in the middle."""
        self._transport.close()

    async def hung_up(self) -> None:
        """Wait until the client has left."""
        await asyncio.wait_for(self.gone.wait(), DEADLINE_S)


class _Connection(asyncio.Protocol):
    def __init__(self, engine: HeldEngine) -> None:
        self._engine = engine
        self._buffer = b""
        self._generations: list[Generation] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._engine.connections.append(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        length = int(headers.get("content-length", 0))
        if blank and len(rest) >= length:
            self._buffer = rest[length:]
            self._generations.append(Generation(self._transport, lines[0].split()[1], rest[:length]))
            self._engine.waiting.put_nowait(self._generations[-1])

    def connection_lost(self, exc: Exception | None) -> None:
        for generation in self._generations:
            generation.gone.set()


class HeldEngine:
    """The server, as an async context manager; `url` is its base without `/v1`."""

    def __init__(self) -> None:
        self.connections: list[asyncio.Transport] = []
        self.waiting: asyncio.Queue[Generation] = asyncio.Queue()
        self.url = ""

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for transport in self.connections:
            transport.abort()

    async def next(self) -> Generation:
        """The next request that nobody has taken yet."""
        return await asyncio.wait_for(self.waiting.get(), DEADLINE_S)
