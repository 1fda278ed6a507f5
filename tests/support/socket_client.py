"""A client of the Responses API over WebSocket, in a box.

async with connected(box) as talk:
    answer = await talk.ask("go")          # the messages up to the terminal one
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from tests.support.held_engine import DEADLINE_S
from tests.support.rig import RESPONSES, Box

LAST = ("response.completed", "response.failed", "response.incomplete", "error")


def create(asked: str | list[dict[str, Any]] = "go", **fields: Any) -> dict[str, Any]:
    """A small `response.create`, which stores nothing, as Codex's."""
    return {"type": "response.create", "model": "gpt-x", "input": asked, "store": False, **fields}


class Talk:
    """One connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket

    async def send(self, asked: str | list[dict[str, Any]] = "go", **fields: Any) -> str:
        """A `response.create` with these fields; returns its text."""
        text = json.dumps(create(asked, **fields))
        await self.socket.send_str(text)
        return text

    async def next(self) -> dict[str, Any]:
        """The next message."""
        event: dict[str, Any] = json.loads(await self.socket.receive_str(timeout=DEADLINE_S))
        return event

    async def until(self, *kinds: str) -> list[dict[str, Any]]:
        """The messages up to the first one of these types."""
        seen = [await self.next()]
        while seen[-1]["type"] not in (kinds or LAST):
            seen.append(await self.next())
        return seen

    async def ask(self, asked: str | list[dict[str, Any]] = "go", **fields: Any) -> list[dict[str, Any]]:
        """Ask, and read the answer."""
        await self.send(asked, **fields)
        return await self.until()

    async def closed(self) -> int | None:
        """The code with which the other side closes."""
        await self.socket.receive(timeout=DEADLINE_S)
        return self.socket.close_code


def response_id(answer: list[dict[str, Any]]) -> str:
    """The id of the response that an answer ends with."""
    assert answer[-1]["type"] == "response.completed", answer[-1]
    found: str = answer[-1]["response"]["id"]
    return found


@asynccontextmanager
async def connected(box: Box, **options: Any) -> AsyncIterator[Talk]:
    """A connection, compressed unless `compress=0`."""
    async with box.http() as http, http.ws_connect(RESPONSES, **({"compress": 15} | options)) as socket:
        yield Talk(socket)
