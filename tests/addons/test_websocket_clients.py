"""WebSockets with the official SDK, in compactions, and in replays."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, Script, always, sequence
from polar_mitm.dialects.ids import unseal
from polar_mitm.replay import Replay
from polar_mitm.types import ModelCall
from polar_mitm_addons.replay import ServeRecorded
from tests.addons.test_sdks import gpt, names_resolve_here
from tests.support.rig import rig, trusting
from tests.support.socket_client import connected, response_id

__all__ = ["names_resolve_here"]

ANSWER = Answer(text="abc", reasoning="Hm.", tokens_per_chunk=1)


async def test_the_sdk_holds_a_conversation() -> None:
    async with ScriptedEngine(always(ANSWER)) as engine, rig(engine.url) as r:
        box = await r.box()
        options: Any = {"ssl": trusting(box.interceptor.ca_pem), "proxy": None}
        previous: dict[str, Any] = {}
        async with gpt(box).responses.connect(websocket_connection_options=options) as connection:
            for turn in range(3):
                await connection.response.create(model="gpt-x", input=f"turn {turn}", **previous)
                text = ""
                async for event in connection:
                    if event.type == "response.output_text.delta":
                        text += event.delta
                    if event.type == "response.completed":
                        break
                assert text == event.response.output_text == "abc"
                previous = {"previous_response_id": event.response.id}
        assert [len(call.request["messages"]) for call in engine.calls] == [1, 3, 5]
        assert [call.status for call in r.recorder.calls] == ["ok"] * 3


@pytest.mark.parametrize(
    ("answer", "summary"),
    [
        (Answer(text=" All is done. ", reasoning="Hm."), "All is done."),
        (Answer(reasoning="Hm, done."), "Hm, done."),
        (Answer(tool_calls=[("look", '{"at": "it"}')]), 'look {"at": "it"}'),
        (Answer(text="cut", finish_reason="length"), "cut"),
        (Answer(), ""),
    ],
    ids=["text", "reasoning", "tool", "cut", "nothing"],
)
async def test_a_compaction_is_exactly_one_item(answer: Answer, summary: str) -> None:
    look = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    async with ScriptedEngine(always(answer)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with connected(box) as talk:
            asked = [{"role": "user", "content": "go"}, {"type": "compaction_trigger"}]
            messages = await talk.ask(asked, tools=[look])
            response_id(messages)
            done = [m["item"] for m in messages if m["type"] == "response.output_item.done"]
            assert done == messages[-1]["response"]["output"] and [i["type"] for i in done] == ["compaction"]
            sealed = unseal(done[0]["encrypted_content"])
            assert sealed is not None and sealed.text == summary
            await talk.ask([*done, {"role": "user", "content": "go on"}], tools=[look])
        first, second = engine.calls
        assert first.request.get("tool_choice") in (None, "none")
        assert summary in json.dumps(second.request["messages"][0]["content"]).replace('\\"', '"')
        assert [call.role for call in r.recorder.calls] == ["compaction", "main"]


async def recorded(script: Script) -> list[ModelCall]:
    """A warmed-up conversation of two turns."""
    async with ScriptedEngine(script) as engine, rig(engine.url) as r:
        async with connected(await r.box()) as talk:
            await conversation(talk)
        return list(await r.recorder.until_calls(3))


async def conversation(talk: Any) -> list[dict[str, Any]]:
    seen = last = await talk.ask([{"role": "developer", "content": "Be brief."}], generate=False)
    for turn in range(2):
        last = await talk.ask(f"turn {turn}", previous_response_id=response_id(last))
        seen = [*seen, *last]
    return seen


@pytest.mark.parametrize("fast", [True, False])
async def test_a_replay_says_the_same_messages(fast: bool) -> None:
    calls = await recorded(sequence(ANSWER, Answer(text="Done.")))
    replay = Replay("r1", calls)
    serve = functools.partial(ServeRecorded, replay=replay, fast=fast)
    async with rig("http://127.0.0.1:9", model_calls=serve) as r:
        async with connected(await r.box("again")) as talk:
            seen = await conversation(talk)
            (refused,) = await talk.ask("more")  # there is nothing left in the record
            assert refused["status"] == 400 and "no recorded call is left" in refused["error"]["message"]
        again = await r.recorder.until_calls(4)
    assert seen == [json.loads(line) for call in calls for line in call.wire.response_body.splitlines()]
    assert [c.replayed_from for c in again] == [*[c.call_id for c in calls], None]
    assert [c.completion_token_ids for c in again[:3]] == [c.completion_token_ids for c in calls]
    assert [step.outcome for step in replay.report().steps] == ["same"] * 3 + ["unmatched"]


async def test_a_fork_goes_on_live_on_the_same_connection() -> None:
    calls = await recorded(sequence(ANSWER, Answer(text="Done.")))
    replay = Replay("r1", calls, fork_at=calls[2].call_id)
    serve = functools.partial(ServeRecorded, replay=replay, fast=True)
    live_engine = ScriptedEngine(always(Answer(text="Live.")))
    async with live_engine as engine, rig(engine.url, model_calls=serve) as r:
        async with connected(await r.box("again")) as talk:
            seen = await conversation(talk)
        live = (await r.recorder.until_calls(3))[2]
    assert seen[-1]["response"]["output"][0]["content"][0]["text"] == "Live."
    roles = [(m["role"], m["content"]) for m in engine.calls[0].request["messages"]]
    said = [("user", "turn 0"), ("assistant", "abc"), ("user", "turn 1")]
    assert roles == [("system", "Be brief."), *said]
    assert live.replayed_from is None and live.status == "ok"


async def test_a_record_without_websockets_is_replayed_without() -> None:
    calls = [c for c in await recorded(always(ANSWER)) if not c.wire.method]
    serve = functools.partial(ServeRecorded, replay=Replay("r1", calls), fast=True)
    async with rig("http://127.0.0.1:9", model_calls=serve) as r:
        with pytest.raises(Exception, match="426"):
            async with connected(await r.box("again")):
                pass
