"""Several answers to one request through the whole interceptor: the wire, the store, what comes after."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, Script, always
from polar_mitm.dialects.ids import sibling
from polar_mitm.reconstruct import build
from polar_mitm.replay import Replay
from polar_mitm.store import Recorder, open_reader
from polar_mitm.types import ModelCall, Wire
from polar_mitm.upstream.probe import probe
from polar_mitm_addons.replay import ServeRecorded
from tests.addons.test_sdks import gpt, names_resolve_here  # noqa: F401
from tests.support.engine_bytes import events
from tests.support.held_engine import HeldEngine
from tests.support.rig import Box, rig, settled, until

CHAT = "https://api.openai.com/v1/chat/completions"
ODD = '{"command":"ls",   "timeout" : 3}'  # as no template writes it: rendered, it has other ids
ANY = {"type": "object", "properties": {}, "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "Bash", "parameters": ANY, "strict": True}}
MANY = Answer(
    text="one",
    tokens_per_chunk=2,
    others=[
        Answer(text="two", tool_calls=[("Bash", ODD)]),
        Answer(text="three", tool_calls=[("Bash", "{}")]),
    ],
)


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "go"}]
    return {"model": "gpt-x", "messages": messages, "tools": [TOOL], "n": 3, "stream": True, **fields}


async def ask(box: Box, **fields: Any) -> bytes:
    async with box.http() as http, http.post(CHAT, json=body(**fields)) as response:
        answer = await response.read()
        assert response.status == 200, answer
        return answer


def follow(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation that goes on from an answer."""
    used = answer.get("tool_calls") or []
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in used]
    return [*body()["messages"], answer, *results, *([] if used else [{"role": "user", "content": "more"}])]


@pytest.mark.parametrize("stream", [True, False])
async def test_the_end_waits_until_every_answer_is_durable(stream: bool) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        r.recorder.hold = True
        box = await r.box()
        asking = asyncio.ensure_future(ask(box, stream=stream))
        (await engine.next()).finish(*events(MANY, n=3))
        calls = await r.recorder.until_calls(3)
        for held in r.recorder.held:
            await settled()
            assert not asking.done()
            held.set_result(True)
        out = await asking
    assert [c.call_id for c in calls] == [sibling(calls[0].call_id, k) for k in range(3)]
    assert calls[0].wire.response_body == out and [c.wire for c in calls[1:]] == [Wire()] * 2
    assert all(c.delivered for c in calls)


async def test_an_sdk_reads_them_all_streamed_and_whole() -> None:
    async with ScriptedEngine(always(MANY)) as engine, rig(engine.url) as r:
        box = await r.box()
        async with gpt(box) as client:
            said: Any = {k: v for k, v in body().items() if k != "stream"}
            whole = await client.chat.completions.create(**said, logprobs=True, top_logprobs=2)
            async with client.chat.completions.stream(**said, logprobs=True, top_logprobs=2) as stream:
                streamed = await stream.get_final_completion()
        calls = list(await r.recorder.until_calls(6))
    for answer, three in ((whole, calls[:3]), (streamed, calls[3:])):
        assert [c.index for c in answer.choices] == [0, 1, 2]
        assert [c.message.content for c in answer.choices] == ["one", "two", "three"]
        assert [bool(c.message.tool_calls) for c in answer.choices] == [False, True, True]
        for choice, call in zip(answer.choices, three, strict=True):
            assert choice.logprobs is not None and choice.logprobs.content is not None
            shown = [p.logprob for p in choice.logprobs.content]  # of the text, whose tokens come first
            assert shown and shown == call.behaviour_logprobs[: len(shown)]
            assert all(len(p.top_logprobs) == 2 for p in choice.logprobs.content)
            assert byte_tokens.decode(call.completion_token_ids).startswith(choice.message.content or "-")
    asked = [call.completion_token_ids for call in calls]
    sampled = [ids for c in engine.calls for ids in (c.completion_token_ids, *c.other_token_ids)]
    assert asked == sampled


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_what_follows_goes_on_from_the_sampled_ids_of_one_also_for_several(number: int) -> None:
    async with ScriptedEngine(_first(MANY, Answer(text="Done.", others=[Answer(text="Fine.")]))) as engine:
        info = await probe(engine.url)
        engine.calls.clear()
        async with rig(engine.url, engine=info) as r:
            box = await r.box()
            answers = json.loads(await ask(box, stream=False))["choices"]
            await ask(box, messages=follow(answers[number]["message"]), n=2)
            calls = list(await r.recorder.until_calls(5))
    parent, after = calls[number], calls[3:]
    known = [*parent.prompt_token_ids, *parent.completion_token_ids]
    assert [(c.parent_call_id, c.continuation, c.fallback) for c in after] == [
        (parent.call_id, "exact", None)
    ] * 2
    assert all(list(c.prompt_token_ids)[: len(known)] == known for c in after)
    assert engine.calls[-1].prompt_token_ids == list(after[0].prompt_token_ids)
    assert [byte_tokens.decode(c.completion_token_ids) for c in after] == [
        "Done.<|im_end|>",
        "Fine.<|im_end|>",
    ]
    # Each sampled token trains once, but for the answers that the harness let go of.
    _, report = build(calls)
    assert report.adds_up and report.num_quarantined == 0
    assert report.masked == {"orphan": sum(len(c.completion_token_ids) for c in calls[:3] if c is not parent)}


def _first(first: Answer, then: Answer) -> Script:
    """`first`, until an answer is in the history; the probe offers another tool."""

    def script(request: dict[str, Any], nth: int) -> Answer:
        if "Bash" not in [tool["function"]["name"] for tool in request.get("tools") or []]:
            return Answer(text="ok")
        return then if any(m["role"] == "assistant" for m in request["messages"]) else first

    return script


async def test_an_engine_that_ignores_ids_spoils_every_answer() -> None:
    async with ScriptedEngine(_first(MANY, Answer(text="x"))) as engine:
        info = await probe(engine.url)
        async with rig(engine.url, engine=info) as r:
            box = await r.box()
            answers = json.loads(await ask(box, stream=False))["choices"]
            engine.takes_ids = False
            await ask(box, messages=follow(answers[1]["message"]))
            calls = list(await r.recorder.until_calls(6))
    assert {c.fallback for c in calls[3:]} == {"engine_ignored_token_input"}


async def test_they_are_in_the_store_and_are_continued_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    async with ScriptedEngine(_first(MANY, Answer(text="Done."))) as engine:
        info = await probe(engine.url)
        with Recorder(path) as store:
            async with rig(engine.url, store, engine=info) as r:
                answers = json.loads(await ask(await r.box("r1"), stream=False))["choices"]
        with Recorder(path) as store:
            async with rig(engine.url, store, engine=info) as r:
                box = await r.box("r1")
                await ask(box, messages=follow(answers[2]["message"]), n=1)
                await box.close()
    with open_reader(path) as reader:
        calls = reader.calls("r1", wire=True)
    assert [c.seq for c in calls] == [0, 0, 0, 1]
    assert [c.answer_of for c in calls] == [None, calls[0].call_id, calls[0].call_id, None]
    assert [bool(c.wire.request_body) for c in calls] == [True, False, False, True]
    assert [c.answer.text for c in calls if c.answer] == ["one", "two", "three", "Done."]
    assert (calls[3].parent_call_id, calls[3].continuation) == (calls[2].call_id, "exact")
    assert len({tuple(c.prompt_token_ids) for c in calls[:3]}) == 1
    assert all(c.upstream_body == calls[0].upstream_body for c in calls[:3])


async def test_a_hang_up_keeps_what_each_had() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = asyncio.ensure_future(http.post(CHAT, json=body()))
            generation = await engine.next()
            generation.send(*events(MANY, n=3)[:6])
            response = await asking
            await response.content.readany()
            response.close()
            await generation.hung_up()
        calls = list(await r.recorder.until_calls(3))
    assert [(c.status, len(c.completion_token_ids)) for c in calls] == [("cancelled", 2)] * 3


async def test_they_are_replayed_and_live_calls_go_on_from_any() -> None:
    script = _first(MANY, Answer(text="Done."))
    async with ScriptedEngine(script) as engine:
        info = await probe(engine.url)
        async with rig(engine.url, engine=info) as r:
            box = await r.box()
            out = await ask(box, stream=False)
            messages = follow(json.loads(out)["choices"][1]["message"])
            await ask(box, messages=messages, n=1)
            recorded = list(await r.recorder.until_calls(4))
        replay = Replay("r1", recorded, fork_at=recorded[3].call_id)
        serve = functools.partial(ServeRecorded, replay=replay, fast=True)
        async with rig(engine.url, engine=info, model_calls=serve) as r:
            box = await r.box("again")
            assert await ask(box, stream=False) == out
            await ask(box, messages=messages, n=1)
            again = list(await r.recorder.until_calls(4))
    assert replay.report().faithful
    assert [c.replayed_from for c in again] == [*(c.call_id for c in recorded[:3]), None]
    assert [c.answer_of for c in again] == [None, again[0].call_id, again[0].call_id, None]
    assert [c.completion_token_ids for c in again] == [c.completion_token_ids for c in recorded]
    assert (again[3].parent_call_id, again[3].continuation) == (again[1].call_id, "exact")
    assert list(again[3].prompt_token_ids) == list(recorded[3].prompt_token_ids)
    assert {c.status for c in again} == {"ok"} and all(c.rollout_id == "again" for c in again)


async def test_what_the_engine_refuses_of_several_is_a_bad_request() -> None:
    async with ScriptedEngine(always(MANY)) as engine, rig(engine.url, temperature=0.0) as r:
        box = await r.box()
        async with box.http() as http, http.post(CHAT, json=body()) as response:
            answer = await response.json()
            assert response.status == 400 and "greedy" in answer["error"]["message"]
        calls = list(await r.recorder.until_calls(3))
    assert [c.status for c in calls] == ["failed"] * 3 and not any(c.completion_token_ids for c in calls)


async def test_each_is_counted() -> None:
    async with ScriptedEngine(always(MANY)) as engine, rig(engine.url) as r:
        box = await r.box()
        await ask(box)
        await until(lambda: box.session.num_calls == 3)
        calls: list[ModelCall] = list(r.recorder.calls)
    assert box.session.num_sampled_tokens == sum(len(c.completion_token_ids) for c in calls)
