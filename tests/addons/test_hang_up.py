"""A harness that hangs up ends the generation, and leaves its partial tokens behind."""

from __future__ import annotations

import pytest

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, always
from tests.support.engine_bytes import PROMPT_IDS, events, sampled
from tests.support.held_engine import HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, post, read_until, rig, says, until

both = pytest.mark.parametrize("url", [MESSAGES, RESPONSES], ids=["anthropic", "openai"])
ANSWER = Answer(text="abc", tokens_per_chunk=1)


@both
async def test_in_the_middle_of_a_stream(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url)
            generation = await engine.next()
            generation.send(*events(ANSWER)[:3])
            response = await asking
            await read_until(response, says("b"))
            response.close()
            await generation.hung_up()
        (call,) = await r.recorder.until_calls(1)
        assert (call.status, call.delivered, call.finish_reason) == ("cancelled", False, None)
        assert call.error == "the harness hung up"
        assert call.prompt_token_ids == PROMPT_IDS
        assert call.completion_token_ids == [t.token_id for t in sampled(ANSWER)][:2]
        assert len(call.behaviour_logprobs) == 2


@both
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("headed", [True, False], ids=["engine answered", "engine silent"])
async def test_before_the_first_byte(url: str, stream: bool, headed: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url, head_grace_s=60) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url, stream=stream)
            generation = await engine.next()
            if headed:
                generation.head()
            asking.cancel()
            await generation.hung_up()
        (call,) = await r.recorder.until_calls(1)
        assert (call.status, call.delivered, call.wire.status) == ("cancelled", False, 0)
        assert call.completion_token_ids == []


@both
async def test_in_the_middle_of_a_whole_answer(url: str) -> None:
    # Had the engine not been asked to stream, there would be no tokens to keep.
    async with ScriptedEngine(always(Answer(text="x" * 10_000, chunk_delay_s=0.01))) as engine:
        async with rig(engine.url) as r:
            box = await r.box()
            async with box.http() as http:
                asking = post(http, url, stream=False)
                await until(lambda: any(len(call.sent_token_ids) > 20 for call in engine.calls))
                asking.cancel()
                await engine.calls[0].ended.wait()
            (call,) = await r.recorder.until_calls(1)
        assert engine.calls[0].outcome == "cancelled"
        assert call.status == "cancelled"
        assert 0 < len(call.completion_token_ids) == len(call.behaviour_logprobs)
        sent = engine.calls[0].completion_token_ids
        assert call.completion_token_ids == sent[: len(call.completion_token_ids)] != sent


@both
async def test_while_the_stream_has_only_begun(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url)
            generation = await engine.next()
            generation.head()
            response = await asking  # the interceptor has released the head on its own
            assert response.status == 200
            response.close()
            await generation.hung_up()
        (call,) = await r.recorder.until_calls(1)
        assert (call.status, call.wire.status) == ("cancelled", 200)


@both
async def test_in_the_middle_of_the_request(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        name = url.split("/")[2]
        reader, writer = await box.connect(name)
        path = url.removeprefix(f"https://{name}")
        head = f"POST {path} HTTP/1.1\r\nhost: {name}\r\ncontent-length: 1000\r\n\r\n"
        writer.write(head.encode() + b'{"model": ')
        await writer.drain()
        writer.close()
        assert await reader.read() == b""
        await box.close()
        assert engine.connections == [] and r.recorder.calls == []


async def test_one_of_two_calls_leaves_the_other_alone() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asked = [post(http, MESSAGES, text=name) for name in ("one", "two")]
            first, second = await engine.next(), await engine.next()
            if "two" in str(first.body["messages"]):
                first, second = second, first
            asked[0].cancel()
            await first.hung_up()
            second.finish(*events(ANSWER))
            assert b"message_stop" in await (await asked[1]).read()
        assert sorted(call.status for call in r.recorder.calls) == ["cancelled", "ok"]
