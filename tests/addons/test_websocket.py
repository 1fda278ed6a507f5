"""The Responses API over WebSocket: the same calls, in messages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, always
from tests.support.rig import RESPONSES, Box, rig


@asynccontextmanager
async def connected(box: Box, **options: Any) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with box.http() as http, http.ws_connect(RESPONSES, **({"compress": 15} | options)) as socket:
        yield socket


def create(text: str | list[dict[str, Any]] = "go", **fields: Any) -> dict[str, Any]:
    return {"type": "response.create", "model": "gpt-x", "input": text, "store": False, **fields}


async def answer(socket: aiohttp.ClientWebSocketResponse) -> list[dict[str, Any]]:
    """The messages up to the terminal one."""
    seen: list[dict[str, Any]] = []
    while True:
        seen.append(json.loads(await socket.receive_str(timeout=30)))
        if seen[-1]["type"] in ("response.completed", "response.failed", "response.incomplete", "error"):
            return seen


async def test_it() -> None:
    async with ScriptedEngine(always(Answer(text="abc", tokens_per_chunk=1))) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as socket:
            await socket.send_json(create("", generate=False))
            first = (await answer(socket))[-1]["response"]["id"]
            await socket.send_json(create("one", previous_response_id=first))
            second = await answer(socket)
            print(second)
            await socket.send_json(create("two", previous_response_id=second[-1]["response"]["id"]))
            third = await answer(socket)
        for c in r.recorder.calls:
            print(c.status, c.route, c.continuation, c.fallback, c.parent_call_id)
        print(r.recorder.events)
        assert r.recorder.calls[1].parent_call_id == r.recorder.calls[0].call_id
