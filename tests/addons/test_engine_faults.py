"""Engines that are down, slow or broken: an answer that the harness understands, never a hang."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from polar_mitm.conformance.scripts import Answer
from polar_mitm_addons import intercept
from tests.support.engine_bytes import events, sampled
from tests.support.held_engine import HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, Rig, next_event, post, read_until, rig, says, until

ANSWER = Answer(text="abc", tokens_per_chunk=1)


@dataclass(frozen=True)
class Provider:
    url: str
    overloaded: int
    error_type: str
    error_event: str


ANTHROPIC = Provider(MESSAGES, 529, "overloaded_error", "error")
OPENAI = Provider(RESPONSES, 503, "service_unavailable_error", "response.failed")
both = pytest.mark.parametrize("to", [ANTHROPIC, OPENAI], ids=["anthropic", "openai"])
streamed_or_not = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


async def overloaded(to: Provider, response: aiohttp.ClientResponse, r: Rig) -> str:
    """Check that this is the provider's overload error, recorded; its message."""
    assert response.status == to.overloaded
    assert response.headers["retry-after"] == "5"
    assert response.headers["content-type"] == "application/json"
    error: dict[str, str] = (await response.json())["error"]
    assert error["type"] == to.error_type
    (call,) = r.recorder.calls
    assert (call.status, call.wire.status, call.delivered) == ("failed", to.overloaded, False)
    assert call.error == f"overloaded: {error['message']}"
    return error["message"]


@both
@streamed_or_not
async def test_down(to: Provider, stream: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with rig(f"http://127.0.0.1:{taken.getsockname()[1]}") as r:
            box = await r.box()
            async with box.http() as http:
                message = await overloaded(to, await post(http, to.url, stream=stream), r)
                assert "connection failed" in message


@both
@streamed_or_not
async def test_refuses(to: Provider, stream: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url, stream=stream)
            generation = await engine.next()
            generation.head(500)
            generation.finish(b'{"error": {"message": "out of memory"}}')
            message = await overloaded(to, await asking, r)
            assert message == "engine answered 500: out of memory"


@both
async def test_refuses_the_request_itself(to: Provider) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url)
            generation = await engine.next()
            generation.head(400)
            generation.finish(b'{"error": {"message": "maximum context length is 8 tokens"}}')
            response = await asking
            assert response.status == 400
            words = "prompt is too long" if to is ANTHROPIC else "context_length_exceeded"
            assert words in await response.text()


@both
@streamed_or_not
async def test_never_answers(to: Provider, stream: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url, head_timeout_s=0.3) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url, stream=stream)
            generation = await engine.next()
            assert "silent" in await overloaded(to, await asking, r)
            await generation.hung_up()


@both
@streamed_or_not
async def test_never_accepts(to: Provider, stream: bool) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = listener.getsockname()
    fillers = [socket.socket() for _ in range(3)]
    for filler in fillers:  # the backlog is full: further connections stay unanswered
        filler.setblocking(False)
        filler.connect_ex(address)
    try:
        async with rig(f"http://127.0.0.1:{address[1]}", connect_timeout_s=0.1) as r:
            box = await r.box()
            async with box.http() as http:
                await overloaded(to, await post(http, to.url, stream=stream), r)
    finally:
        for sock in (*fillers, listener):
            sock.close()


@both
@streamed_or_not
async def test_dies_before_its_head(to: Provider, stream: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url, stream=stream)
            (await engine.next()).break_off()
            (await engine.next()).break_off()  # it is asked once more, on a new connection
            await overloaded(to, await asking, r)
            assert engine.waiting.empty()


@both
@streamed_or_not
async def test_a_kept_connection_that_the_engine_had_closed(to: Provider, stream: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url)
            (await engine.next()).finish(*events(ANSWER))
            await (await asking).read()
            asking = post(http, to.url, stream=stream)
            (await engine.next()).break_off()
            (await engine.next()).finish(*events(ANSWER))
            assert b"abc"[-1:] in await (await asking).read()
        assert [call.status for call in r.recorder.calls] == ["ok", "ok"]


@both
@streamed_or_not
@pytest.mark.parametrize("how", ["closed", "ended", "garbage", "no http", "error event"])
async def test_breaks_before_its_first_chunk(to: Provider, stream: bool, how: str) -> None:
    async with HeldEngine() as engine, rig(engine.url, head_grace_s=60) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url, stream=stream)
            generation = await engine.next()
            if how == "closed":
                generation.head()
                generation.break_off()
            elif how == "ended":
                generation.finish()
            elif how == "garbage":
                generation.finish(b"data: {nonsense\n\n")
            elif how == "no http":
                generation.raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            else:
                generation.finish(b'data: {"error": {"message": "boom"}}\n\n')
            await overloaded(to, await asking, r)


FAULTS: dict[str, bytes] = {
    "garbage": b"data: {nonsense\n\n",
    "error event": b'data: {"error": {"message": "boom"}}\n\n',
    "wrong types": b'data: {"choices": 5}\n\n',
}


@both
@pytest.mark.parametrize("how", ["closed", "ended", "silent", *FAULTS])
async def test_breaks_in_the_middle_of_a_stream(to: Provider, how: str) -> None:
    async with HeldEngine() as engine, rig(engine.url, idle_timeout_s=1 if how == "silent" else 60) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url)
            generation = await engine.next()
            generation.send(*events(ANSWER)[:3])
            response = await asking
            await read_until(response, says("b"))
            if how == "closed":
                generation.break_off()
            elif how == "ended":
                generation.finish()
            elif how != "silent":
                generation.send(FAULTS[how])
            last = (await read_until(response, to.error_event))[-1]
            assert await response.content.read() == b""  # the answer ends, properly
            if how != "ended":
                await generation.hung_up()
        assert response.status == 200
        error = last["error"] if to is ANTHROPIC else last["response"]["error"]
        (call,) = r.recorder.calls
        words = error["message"].removeprefix("Internal server error: ")  # Anthropic's own come first
        assert call.status == "failed" and call.error == f"upstream: {words}"
        assert call.completion_token_ids == [t.token_id for t in sampled(ANSWER)][:2]
        assert call.wire.status == 200 and error["message"].encode() in call.wire.response_body


@both
@pytest.mark.parametrize("how", ["closed", "ended", "silent", *FAULTS])
async def test_breaks_in_the_middle_of_a_whole_answer(to: Provider, how: str) -> None:
    async with HeldEngine() as engine, rig(engine.url, idle_timeout_s=1 if how == "silent" else 60) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url, stream=False)
            generation = await engine.next()
            generation.send(*events(ANSWER)[:3])
            if how == "closed":
                generation.break_off()
            elif how == "ended":
                generation.finish()
            elif how != "silent":
                generation.send(FAULTS[how])
            await overloaded(to, await asking, r)
        assert len(r.recorder.calls[0].completion_token_ids) == 2


@pytest.mark.parametrize("closed", [True, False])
async def test_an_end_after_done_is_not_waited_for_long(
    closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intercept, "LINGER_S", 0.05)
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, MESSAGES)
            generation = await engine.next()
            generation.send(*events(ANSWER))  # [DONE] comes, the end of the body never does
            if closed:
                generation.break_off()
            assert (await read_until(await asking, "message_stop"))[-1]
        assert r.recorder.calls[0].status == "ok"


# --- slow, but alive ------------------------------------------------------------------------------------


async def test_anthropic_clients_are_kept_waiting_with_pings() -> None:
    async with HeldEngine() as engine, rig(engine.url, keepalive_s=0.02) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, MESSAGES)
            generation = await engine.next()
            generation.head()
            response = await asking
            assert (await next_event(response))["type"] == "message_start"
            assert [(await next_event(response))["type"] for _ in range(3)] == ["ping"] * 3
            generation.send(*events(ANSWER)[:2])
            assert (await read_until(response, says("a")))[-1]
            assert (await read_until(response, "ping"))[-1]
            generation.finish(*events(ANSWER)[2:])
            rest = await read_until(response, "message_stop")
            assert "message_start" not in [event["type"] for event in rest]
        (call,) = r.recorder.calls
        assert call.status == "ok"
        assert call.wire.response_body.count(b"event: ping") >= 4
        assert sum(call.wire.chunk_sizes) == len(call.wire.response_body)


async def test_responses_clients_get_no_event_that_they_do_not_know() -> None:
    async with HeldEngine() as engine, rig(engine.url, keepalive_s=0.01) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, RESPONSES)
            generation = await engine.next()
            generation.head()
            response = await asking
            start = [(await next_event(response))["type"] for _ in range(2)]
            assert start == ["response.created", "response.in_progress"]
            more: asyncio.Future[dict[str, Any]] = asyncio.ensure_future(next_event(response))
            await asyncio.sleep(0.1)
            assert not more.done()
            generation.finish(*events(ANSWER))
            assert (await more)["type"] == "response.output_item.added"
            await read_until(response, "response.completed")
        assert b"ping" not in r.recorder.calls[0].wire.response_body


@both
async def test_a_slow_engine_that_breaks_after_the_head_was_released(to: Provider) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, to.url)
            generation = await engine.next()
            generation.head()
            response = await asking
            assert response.status == 200
            generation.break_off()
            last = (await read_until(response, to.error_event))[-1]
            assert "connection failed" in json.dumps(last)
        assert r.recorder.calls[0].status == "failed"


async def test_a_whole_answer_may_take_longer_than_the_head_timeout() -> None:
    async with HeldEngine() as engine, rig(engine.url, head_timeout_s=1) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, MESSAGES, stream=False)
            generation = await engine.next()
            first, *rest = events(ANSWER)
            generation.send(first)
            await asyncio.sleep(1.2)
            generation.finish(*rest)
            assert (await asking).status == 200


async def test_a_client_that_leaves_during_a_ping_is_noticed() -> None:
    async with HeldEngine() as engine, rig(engine.url, keepalive_s=0.01) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, MESSAGES)
            generation = await engine.next()
            generation.head()
            response = await asking
            await read_until(response, "ping")
            response.close()
            await generation.hung_up()
        await until(lambda: len(r.recorder.calls) == 1)
        assert r.recorder.calls[0].status == "cancelled"
