"""Real streaming: what the engine has said, the harness can read, before the engine says more."""

from __future__ import annotations

import asyncio
import gc
import json

import pytest

from polar_mitm.conformance.scripts import Answer
from polar_mitm.exchange import Exchange
from tests.support.engine_bytes import PROMPT_IDS, events, sampled
from tests.support.held_engine import DEADLINE_S, HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, ask, next_event, post, read_until, rig, says, settled

both = pytest.mark.parametrize("url", [MESSAGES, RESPONSES], ids=["anthropic", "openai"])
LAST = {MESSAGES: "message_stop", RESPONSES: "response.completed"}
ANSWER = Answer(text="abc", tokens_per_chunk=1)


@both
async def test_each_chunk_can_be_read_before_the_next_is_sent(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url)
            generation = await engine.next()
            first, *letters, end, usage, done = events(ANSWER)
            generation.send(first)
            response = await asking
            assert response.status == 200
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert (await next_event(response))["type"] in ("message_start", "response.created")
            for letter, event in zip("abc", letters, strict=True):
                generation.send(event)
                await read_until(response, says(letter))
            generation.finish(end, usage, done)
            await read_until(response, LAST[url])
            assert await response.content.read() == b""
        (call,) = r.recorder.calls
        assert (call.status, call.delivered, call.finish_reason, call.stream) == ("ok", True, "stop", True)
        assert call.prompt_token_ids == PROMPT_IDS
        assert call.completion_token_ids == [t.token_id for t in sampled(ANSWER)]
        assert generation.path == "/v1/chat/completions" and generation.body["stream"] is True


@both
async def test_a_whole_answer(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url, stream=False)
            generation = await engine.next()
            assert generation.body["stream"] is True  # so that a hang-up leaves its tokens behind
            generation.finish(*events(ANSWER))
            response = await asking
            body = await response.json()
            assert response.status == 200 and "abc" in json.dumps(body)
        (call,) = r.recorder.calls
        assert (call.status, call.delivered, call.stream) == ("ok", True, False)
        assert json.loads(call.wire.response_body) == body


@both
async def test_the_wire_is_recorded_as_the_harness_saw_it(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url, text="héllo")
            (await engine.next()).finish(*events(ANSWER))
            response = await asking
            seen = await response.read()
            sent = asking.result().request_info.headers
        wire = r.recorder.calls[0].wire
        assert wire.response_body == seen
        assert sum(wire.chunk_sizes) == len(seen) and len(wire.chunk_sizes) == len(wire.chunk_at_ms) > 1
        assert (wire.method, wire.status) == ("POST", 200)
        assert f"https://{wire.host}{wire.path}" == url
        assert json.loads(wire.request_body)["model"] in ("claude-x", "gpt-x")
        assert ("User-Agent", sent["User-Agent"]) in wire.request_headers
        assert dict(wire.response_headers)["cache-control"] == "no-cache"


@pytest.mark.parametrize("stream", [True, False])
@both
async def test_an_answered_call_leaves_nothing_for_the_garbage_collector(url: str, stream: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            gc.collect()
            gc.disable()
            try:
                asking = post(http, url, stream=stream)
                (await engine.next()).finish(*events(ANSWER))
                await (await asking).read()
                del asking
                await settled()
                assert not [held for held in gc.get_objects() if isinstance(held, Exchange)]
            finally:
                gc.enable()


@both
async def test_one_connection_serves_several_calls(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            for turn in range(3):
                asking = post(http, url, text=f"turn {turn}", stream=turn != 1)
                generation = await engine.next()
                assert f"turn {turn}" in json.dumps(generation.body)
                generation.finish(*events(ANSWER))
                await (await asking).read()
            assert len(http.connector._conns) == 1 and len(engine.connections) == 1
        assert [call.seq for call in r.recorder.calls] == [0, 1, 2]
        assert {call.status for call in r.recorder.calls} == {"ok"}


async def test_an_http_1_0_client_reads_to_the_end_of_the_connection() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        reader, writer = await box.connect()
        body = json.dumps(ask(MESSAGES)).encode()
        head = f"POST /v1/messages HTTP/1.0\r\nhost: api.anthropic.com\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        (await engine.next()).finish(*events(ANSWER))
        answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
        writer.close()
        head, _, stream = answer.decode().partition("\r\n\r\n")
        assert " 200 " in head and "chunked" not in head
        assert stream == r.recorder.calls[0].wire.response_body.decode()
