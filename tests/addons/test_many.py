"""Many sandboxes at once: nothing mixed, nothing lost, nobody waits for another."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer
from tests.support.engine_bytes import events
from tests.support.held_engine import DEADLINE_S, HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, Box, listen, post, read_until, rig, says, settled

NUM_BOXES = 64
EVENTS = events(Answer(text="ab", tokens_per_chunk=1))


def echo(request: dict[str, Any], nth: int) -> Answer:
    """An answer that names its question, in more chunks than one read takes."""
    question = request["messages"][-1]["content"]
    return Answer(text=f"<{question}>" * 5, tokens_per_chunk=3)


async def converse(box: Box, turns: int) -> None:
    """Calls of both providers, streamed and whole; each answer must be the question's own."""
    me = box.rollout.rollout_id
    async with box.http() as http:
        for turn in range(turns):
            question = f"{me}.{turn}"
            url = (MESSAGES, RESPONSES)[turn % 2]
            stream = turn != 2
            response = await post(http, url, text=question, stream=stream)
            body = (await response.read()).decode()
            assert response.status == 200
            if stream:
                data = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: ")]
                text = "".join(
                    d if isinstance(d := event.get("delta", ""), str) else d.get("text", "") for event in data
                )
                assert text == f"<{question}>" * 5
            else:
                assert f"<{question}>" * 5 in body


async def test_64_sandboxes_at_once() -> None:
    async with ScriptedEngine(echo) as engine, rig(engine.url) as r:
        boxes = [await r.box(f"r{n}") for n in range(NUM_BOXES)]
        await asyncio.gather(*(converse(box, turns=4) for box in boxes))
        for box in boxes:
            await box.close()
        assert len(r.recorder.calls) == NUM_BOXES * 4 == len({call.call_id for call in r.recorder.calls})
        for box in boxes:
            me = box.rollout.rollout_id
            calls = sorted((c for c in r.recorder.calls if c.rollout_id == me), key=lambda c: c.seq)
            assert [call.seq for call in calls] == [0, 1, 2, 3]
            assert {call.status for call in calls} == {"ok"}
            for turn, call in enumerate(calls):
                assert f"{me}.{turn}" in call.wire.request_body.decode()
                sampled = byte_tokens.decode(call.completion_token_ids)
                assert sampled == f"<{me}.{turn}>" * 5 + "<|im_end|>"
                assert len(call.behaviour_logprobs) == len(call.completion_token_ids)
                assert f"{me}.{turn}<" in byte_tokens.decode(call.prompt_token_ids)
            assert (box.session.num_calls, box.session.num_sampled_tokens) == (
                4,
                sum(len(call.completion_token_ids) for call in calls),
            )
        assert all(call.outcome == "finished" for call in engine.calls)
        assert [rollout.status for rollout in r.recorder.rollouts[-NUM_BOXES:]] == ["completed"] * NUM_BOXES


async def test_the_end_of_one_rollout_does_not_touch_another() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        ending, going_on = await r.box("ending"), await r.box("going on")
        async with ending.http() as one, going_on.http() as two:
            asked = [post(one, MESSAGES, text="one"), post(two, MESSAGES, text="two")]
            generations = [await engine.next(), await engine.next()]
            generations.sort(key=lambda g: "two" in str(g.body["messages"]))
            for generation in generations:
                generation.send(*EVENTS[:2])
            for asking in asked:
                await read_until(await asking, says("a"))
            await ending.close()  # returns although the other's stream goes on
            await generations[0].hung_up()
            generations[1].finish(*EVENTS[2:])
            await read_until(await asked[1], "message_stop")
        assert [(call.rollout_id, call.status) for call in r.recorder.calls] == [
            ("ending", "cancelled"),
            ("going on", "ok"),
        ]


async def test_a_closed_rollout_serves_nobody() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        reader, writer = await box.connect(None)  # accepted before the end, used after it
        async with box.http() as http:
            asking = post(http, MESSAGES)
            (await engine.next()).finish(*EVENTS)
            await (await asking).read()
            await box.close()
            with pytest.raises((OSError, aiohttp.ClientError)):
                await post(http, MESSAGES)
        assert await reader.read() == b""
        writer.close()
        with pytest.raises(OSError):
            await box.connect(None)
        assert len(r.recorder.calls) == 1 and engine.waiting.empty()
        assert r.recorder.events == []


async def test_two_open_rollouts_cannot_have_one_id() -> None:
    async with rig("http://127.0.0.1:9") as r:
        box = await r.box("same")
        with pytest.raises(ValueError, match="same is open already"):
            await r.box("same")
        assert len(r.recorder.rollouts) == 1
        await box.close()
        await (await r.box("same")).close()


@pytest.mark.parametrize("stage", ["connected", "handshaken", "asking"])
async def test_what_is_on_its_way_when_the_rollout_ends_comes_too_late(stage: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        reader, writer = await box.connect(None if stage == "connected" else "api.anthropic.com")
        await settled()
        request = b"POST /v1/messages HTTP/1.1\r\nhost: api.anthropic.com\r\ncontent-length: 2\r\n\r\n"
        if stage == "asking":
            writer.write(request)
            await settled()
        box.session.closed = True  # the first that `close_rollout` does, before it closes anything
        writer.write(b"{}" if stage == "asking" else request + b"{}")
        status = await asyncio.wait_for(reader.readline(), DEADLINE_S)
        assert status.split(b" ")[1] in (b"403", b"502")
        writer.close()
        assert engine.connections == [] and r.recorder.calls == [] == r.recorder.events


async def test_a_session_is_served_once() -> None:
    async with rig("http://127.0.0.1:9") as r:
        box = await r.box()
        sock, _ = listen()
        with sock, pytest.raises(ValueError, match="being served already"):
            await r.interceptor.serve(box.session, [sock])
