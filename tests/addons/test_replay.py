"""Recorded answers over the wire: the same bytes, headers, status and distances; faults as they were."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, Script, always, sequence
from polar_mitm.replay import Replay
from polar_mitm.store.redact import credentials, redact_body, redact_headers
from polar_mitm.types import ModelCall
from polar_mitm_addons.replay import ServeRecorded
from tests.support.engine_bytes import events
from tests.support.held_engine import HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, Box, Rig, ask, post, rig, until

both = pytest.mark.parametrize("url", [MESSAGES, RESPONSES], ids=["anthropic", "openai"])
NOBODY = "http://127.0.0.1:9"


async def record(url: str, script: Script, *, times: int = 1, stream: bool = True) -> list[ModelCall]:
    """Calls as an interceptor in front of a scripted engine records them."""
    async with ScriptedEngine(script) as engine, rig(engine.url, continuation=False) as r:
        box = await r.box()
        async with box.http() as http:
            for _ in range(times):
                async with http.post(url, json=ask(url, stream=stream)) as response:
                    await response.read()
        return list(await r.recorder.until_calls(times))


@asynccontextmanager
async def replaying(
    calls: list[ModelCall], *, fast: bool = True, engine_url: str = NOBODY, fork_at: str | None = None
) -> AsyncIterator[tuple[Rig, Box, Replay]]:
    replay = Replay("r1", calls, fork_at=fork_at)
    serve = functools.partial(ServeRecorded, replay=replay, fast=fast)
    async with rig(engine_url, model_calls=serve) as r:
        yield r, await r.box("again"), replay


@both
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fast", [True, False])
async def test_byte_for_byte(url: str, stream: bool, fast: bool) -> None:
    answer = Answer(text="Grüße", reasoning="hm", tokens_per_chunk=2, chunk_delay_s=0.01)
    (recorded,) = await record(url, always(answer), stream=stream)
    async with replaying([recorded], fast=fast) as (r, box, replay):
        async with box.http() as http, http.post(url, json=ask(url, stream=stream)) as response:
            body = await response.read()
            names = {name.lower() for name, _ in recorded.wire.response_headers}
            headers = [(n.lower(), v) for n, v in response.headers.items() if n.lower() in names]
        assert (response.status, body) == (200, recorded.wire.response_body)
        assert sorted(headers) == sorted((n.lower(), v) for n, v in recorded.wire.response_headers)
        (call,) = await r.recorder.until_calls(1)
    assert replay.report().faithful

    # The fresh call is a call of its own, with the recorded one's tokens.
    assert call.replayed_from == recorded.call_id != call.call_id and call.rollout_id == "again"
    assert (call.status, call.delivered, call.seq) == ("ok", True, 0)
    assert list(call.prompt_token_ids) == list(recorded.prompt_token_ids)
    assert call.completion_token_ids == recorded.completion_token_ids
    assert call.behaviour_logprobs == recorded.behaviour_logprobs
    assert call.wire.response_body == recorded.wire.response_body
    if not fast:
        assert call.wire.chunk_sizes == recorded.wire.chunk_sizes
        pairs = zip(call.wire.chunk_at_ms, recorded.wire.chunk_at_ms, strict=True)
        assert all(ours >= theirs - 1 for ours, theirs in pairs)  # the clocks differ by less


@both
async def test_a_failure_and_its_retry(url: str) -> None:
    recorded = await record(url, sequence(Answer(status=500), Answer(text="ok")), times=2)
    async with replaying(recorded) as (r, box, replay), box.http() as http:
        async with http.post(url, json=ask(url)) as response:
            assert response.status == recorded[0].wire.status != 200
            assert await response.read() == recorded[0].wire.response_body
            assert response.headers["retry-after"] == dict(recorded[0].wire.response_headers)["retry-after"]
        async with http.post(url, json=ask(url)) as response:
            assert await response.read() == recorded[1].wire.response_body
        calls = await r.recorder.until_calls(2)
        assert [call.status for call in calls] == ["failed", "ok"]
        assert replay.report().faithful


@both
async def test_a_stream_that_broke(url: str) -> None:
    broken = Answer(text="a long answer", error_after_tokens=8, chunk_delay_s=0.05)
    (recorded,) = await record(url, always(broken))
    assert recorded.wire.status == 200 and recorded.status == "failed"
    async with replaying([recorded]) as (r, box, replay), box.http() as http:
        async with http.post(url, json=ask(url)) as response:
            assert await response.read() == recorded.wire.response_body
        (call,) = await r.recorder.until_calls(1)
        assert (call.status, call.error) == ("failed", recorded.error)
        assert replay.report().faithful


@both
async def test_what_the_harness_broke_off_is_cut_off(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url)
            generation = await engine.next()
            generation.head()
            generation.send(*events(Answer(text="abc", tokens_per_chunk=1))[:3])
            response = await asking
            await response.content.readany()
            response.close()
            await generation.hung_up()
        (recorded,) = await r.recorder.until_calls(1)
    assert recorded.status == "cancelled" and recorded.wire.response_body
    async with replaying([recorded]) as (r, box, replay), box.http() as http:
        async with http.post(url, json=ask(url)) as response:
            got = b""
            with pytest.raises(aiohttp.ClientError):
                async for data in response.content.iter_any():
                    got += data
            assert got == recorded.wire.response_body
        (call,) = await r.recorder.until_calls(1)
        assert call.status == "cancelled" and call.completion_token_ids == recorded.completion_token_ids
        assert replay.report().faithful


@both
async def test_a_harness_that_hangs_up_now(url: str) -> None:
    (recorded,) = await record(url, always(Answer(text="word " * 20, chunk_delay_s=0.05)))
    async with replaying([recorded], fast=False) as (r, box, replay):
        async with box.http() as http:
            response = await http.post(url, json=ask(url))
            await response.content.readany()
            response.close()
            (call,) = await r.recorder.until_calls(1)
        assert call.status == "cancelled" and not call.delivered
        assert recorded.wire.response_body.startswith(call.wire.response_body)
        assert len(call.wire.response_body) < len(recorded.wire.response_body)
        (step,) = replay.report().steps
        assert step.note is not None and not replay.report().faithful


@both
async def test_a_request_that_was_not_recorded(url: str) -> None:
    recorded = await record(url, always(Answer(text="ok")))
    async with replaying(recorded) as (r, box, replay), box.http() as http:
        async with http.post(url, json={**ask(url), "model": "another"}) as response:
            assert response.status == 400
            said = (await response.json())["error"]
        assert "replay" in said["message"] and said["type"] == "invalid_request_error"
        (call,) = await r.recorder.until_calls(1)
        assert (call.status, call.replayed_from) == ("refused", None)
        (step,) = replay.report().steps
        assert step.outcome == "unmatched" and step.first is not None and step.first.field == "body.model"


async def test_a_secret_is_compared_as_it_was_stored() -> None:
    """The record has a mark in its place; the fresh run sends the secret again."""
    secret = "sk-abcdefghijklmnopqrstuvwxyz"
    async with ScriptedEngine(always(Answer(text="ok"))) as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            await (
                await http.post(MESSAGES, json=ask(MESSAGES, secret), headers={"x-api-key": secret})
            ).read()
        (recorded,) = await r.recorder.until_calls(1)
    known = credentials(recorded.wire)
    recorded.wire.request_body = redact_body(recorded.wire.request_body, known)
    recorded.wire.request_headers = redact_headers(recorded.wire.request_headers, known)
    assert secret.encode() not in recorded.wire.request_body
    async with replaying([recorded]) as (_, box, replay), box.http() as http:
        async with http.post(MESSAGES, json=ask(MESSAGES, secret), headers={"x-api-key": secret}) as response:
            await response.read()
        assert replay.report().faithful


@both
async def test_a_fork_asks_the_engine(url: str) -> None:
    recorded = await record(url, sequence(Answer(text="one"), Answer(text="two")), times=2)
    async with ScriptedEngine(always(Answer(text="live"))) as engine:
        fork_at = recorded[1].call_id
        async with replaying(recorded, engine_url=engine.url, fork_at=fork_at) as (r, box, replay):
            async with box.http() as http:
                async with http.post(url, json=ask(url)) as response:
                    assert await response.read() == recorded[0].wire.response_body
                async with http.post(url, json=ask(url)) as response:
                    assert b"live" in await response.read()
            calls = await r.recorder.until_calls(2)
        assert [call.replayed_from for call in calls] == [recorded[0].call_id, None]
        assert [call.seq for call in calls] == [0, 1] and len(engine.calls) == 1
        assert replay.report().faithful and replay.report().forked


@both
async def test_the_end_of_the_rollout_ends_what_is_being_served(url: str) -> None:
    (recorded,) = await record(url, always(Answer(text="word " * 20, chunk_delay_s=0.02)))
    recorded.wire.chunk_at_ms = [n * 60_000.0 for n in range(len(recorded.wire.chunk_at_ms))]
    async with replaying([recorded], fast=False) as (r, box, _replay), box.http() as http:
        response = await http.post(url, json=ask(url))
        await response.content.readany()
        async with asyncio.timeout(30):
            await box.close()
        (call,) = r.recorder.calls
        assert call.status == "cancelled"
        response.close()


async def test_side_endpoints_are_stubs_as_in_a_capture() -> None:
    recorded = await record(MESSAGES, always(Answer(text="ok")))
    async with replaying(recorded) as (r, box, replay), box.http() as http:
        async with http.get("https://api.anthropic.com/api/hello") as response:
            assert (response.status, json.loads(await response.read())) == (200, {"message": "hello"})
        await until(lambda: len(r.recorder.events) == 1)
        assert r.recorder.events[0].verdict == "stubbed" and replay.report().steps == []
