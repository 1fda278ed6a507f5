"""A record is durable before the end of its answer is let go; a record that fails costs no answer."""

from __future__ import annotations

import asyncio

import pytest

from polar_mitm.conformance.scripts import Answer
from polar_mitm_addons import capture
from tests.support.engine_bytes import events
from tests.support.held_engine import HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, next_event, post, read_until, rig, says, settled

both = pytest.mark.parametrize("url", [MESSAGES, RESPONSES], ids=["anthropic", "openai"])
LAST = {MESSAGES: "message_stop", RESPONSES: "response.completed"}
ANSWER = Answer(text="abc", tokens_per_chunk=1)


@both
async def test_the_terminal_event_waits_for_the_record(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        r.recorder.hold = True
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url)
            (await engine.next()).finish(*events(ANSWER))
            response = await asking
            await read_until(response, says("c"))
            await r.recorder.until_calls(1)
            more = asyncio.ensure_future(read_until(response, LAST[url]))
            await settled()
            assert not more.done()
            r.recorder.held[0].set_result(True)
            assert (await more)[-1]["type"] == LAST[url]


@both
async def test_a_whole_answer_waits_for_the_record(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        r.recorder.hold = True
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url, stream=False)
            (await engine.next()).finish(*events(ANSWER))
            await r.recorder.until_calls(1)
            await settled()
            assert not asking.done()
            r.recorder.held[0].set_result(True)
            assert (await asking).status == 200


@both
@pytest.mark.parametrize("stream", [True, False])
async def test_a_record_that_fails_costs_no_answer(url: str, stream: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        r.recorder.fail = "disk full"
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url, stream=stream)
            (await engine.next()).finish(*events(ANSWER))
            body = await (await asking).read()
            assert (LAST[url].encode() if stream else b"abc") in body
        await box.close()
        assert r.recorder.rollouts[-1].incomplete == "disk full"


@both
@pytest.mark.parametrize("stream", [True, False])
async def test_a_recorder_that_hangs_costs_no_answer(
    url: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "RECORD_TIMEOUT_S", 0.05)
    async with HeldEngine() as engine, rig(engine.url) as r:
        r.recorder.hold = True
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url, stream=stream)
            (await engine.next()).finish(*events(ANSWER))
            body = await (await asking).read()
            assert (LAST[url].encode() if stream else b"abc") in body


@both
@pytest.mark.parametrize("stream", [True, False])
async def test_a_recorder_that_raises_costs_no_answer(url: str, stream: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:

        def broken(call: object) -> None:
            raise OSError("no store")

        r.recorder.call = broken  # type: ignore[method-assign, assignment]
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url, stream=stream)
            (await engine.next()).finish(*events(ANSWER))
            body = await (await asking).read()
            assert (LAST[url].encode() if stream else b"abc") in body


async def test_a_client_that_leaves_while_its_call_is_recorded_keeps_the_record() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        r.recorder.hold = True
        box = await r.box()
        async with box.http() as http:
            asking = post(http, MESSAGES)
            (await engine.next()).finish(*events(ANSWER))
            response = await asking
            assert (await next_event(response))["type"] == "message_start"
            await r.recorder.until_calls(1)
            response.close()
            await settled()
            closing = asyncio.ensure_future(box.close())
            await settled()
            assert not closing.done()  # the rollout's end waits for the record too
            r.recorder.held[0].set_result(True)
            await closing
        (call,) = r.recorder.calls
        assert call.status == "ok" and len(call.completion_token_ids) == 4


@both
async def test_a_closed_rollout_has_all_its_calls(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = post(http, url)
            generation = await engine.next()
            generation.send(*events(ANSWER)[:2])
            await read_until(await asking, says("a"))
            await box.close()
            (call,) = r.recorder.calls
            assert call.status == "cancelled" and call.completion_token_ids
            await generation.hung_up()
        assert r.recorder.rollouts[-1].status == "completed"
        assert r.recorder.rollouts[-1].ended_at is not None
