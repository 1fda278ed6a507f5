"""Counters move with the calls, and a scraper can read them."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from polar_mitm.conformance.scripts import Answer
from tests.support.engine_bytes import PROMPT_IDS, events
from tests.support.held_engine import HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, post, rig

ANSWER = Answer(text="abc", tokens_per_chunk=1)


async def test_calls_and_tokens_are_counted_and_served() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        metrics = r.interceptor.chain.metrics
        box = await r.box()
        async with box.http() as http:
            for url in (MESSAGES, RESPONSES, MESSAGES):
                asking = post(http, url)
                (await engine.next()).finish(*events(ANSWER))
                await (await asking).read()
            await http.post(MESSAGES, data=b"{")
        value = metrics.registry.get_sample_value
        ok = {"dialect": "anthropic", "status": "ok"}
        assert value("polar_mitm_calls_total", ok) == 2
        assert value("polar_mitm_calls_total", ok | {"status": "refused"}) == 1
        assert value("polar_mitm_calls_total", ok | {"dialect": "openai_responses"}) == 1
        assert value("polar_mitm_tokens_total", {"kind": "sampled"}) == 3 * 4
        assert value("polar_mitm_tokens_total", {"kind": "prompt"}) == 3 * len(PROMPT_IDS)
        assert value("polar_mitm_first_token_seconds_count") == 3
        assert value("polar_mitm_call_seconds_count") == 4
        port = metrics.serve(0)
        async with (
            aiohttp.ClientSession() as scraper,
            scraper.get(f"http://127.0.0.1:{port}/metrics") as response,
        ):
            text = await response.text()
        assert 'polar_mitm_calls_total{dialect="anthropic",status="ok"} 2.0' in text
    with pytest.raises(OSError):  # it ends with the interceptor
        await asyncio.open_connection("127.0.0.1", port)


async def test_two_interceptors_count_apart() -> None:
    async with rig("http://127.0.0.1:9") as r:
        box = await r.box()
        async with box.http() as http:
            await http.post(MESSAGES, data=b"{")
    async with rig("http://127.0.0.1:9") as other:
        labels = {"dialect": "anthropic", "status": "refused"}
        counts = [
            one.interceptor.chain.metrics.registry.get_sample_value("polar_mitm_calls_total", labels)
            for one in (r, other)
        ]
        assert counts == [1, None]
