"""A session through the whole interceptor, with an engine that continues: which prompts the engine saw."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace

from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, Script
from polar_mitm.types import ModelCall
from polar_mitm.upstream.probe import probe
from tests.support.rig import MESSAGES, RESPONSES, Box, Rig, rig, until

TOOL = {"type": "object", "properties": {"command": {"type": "string"}}}
# Arguments as no template writes them: a rendering of the history has other ids.
ODD = '{"command":"ls",   "timeout" : 3}'


def session(*answers: Answer) -> Script:
    """One answer after another; those of the probe are not counted, since it offers another tool."""
    left = iter(answers)

    def script(request: dict[str, Any], nth: int) -> Answer:
        tools = [tool["function"]["name"] for tool in request.get("tools") or []]
        return next(left) if "Bash" in tools else Answer(text="ok")

    return script


@asynccontextmanager
async def capturing(script: Script, **options: Any) -> AsyncIterator[tuple[ScriptedEngine, Rig, Box]]:
    """A probed engine, and a rollout in front of it."""
    engine_options = {k: options.pop(k) for k in ("takes_ids", "max_model_len", "images") if k in options}
    async with ScriptedEngine(script, **engine_options) as engine:
        info = replace(await probe(engine.url), **options.pop("info", {}))
        engine.calls.clear()
        engine.renders.clear()
        async with rig(engine.url, engine=info, **options) as r:
            yield engine, r, await r.box()


class Anthropic:
    """A harness of Anthropic's API: it says a text or gives tool results, and sends all of it again."""

    def __init__(self, box: Box, *, echo: Any = lambda blocks: blocks) -> None:
        self.messages: list[dict[str, Any]] = []
        self._box = box
        self._echo = echo

    async def say(self, content: Any, **fields: Any) -> list[dict[str, Any]]:
        self.messages.append({"role": "user", "content": content})
        return await self.ask(**fields)

    async def results(self, *texts: str) -> list[dict[str, Any]]:
        uses = [b for b in self.messages[-1]["content"] if b["type"] == "tool_use"]
        return await self.say(
            [
                {"type": "tool_result", "tool_use_id": use["id"], "content": text}
                for use, text in zip(uses, texts, strict=True)
            ]
        )

    async def ask(self, **fields: Any) -> list[dict[str, Any]]:
        body = {
            "model": "claude-x",
            "max_tokens": 1000,
            "tools": [{"name": "Bash", "description": "run", "input_schema": TOOL}],
            "messages": self.messages,
            **fields,
        }
        async with self._box.http() as http, http.post(MESSAGES, json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        content: list[dict[str, Any]] = answer["content"]
        self.messages.append({"role": "assistant", "content": self._echo(content)})
        return content


def exactly(calls: list[ModelCall]) -> bool:
    """Each call's prompt begins with all that was the one's before."""
    return all(
        list(now.prompt_token_ids)[: len(before.prompt_token_ids) + len(before.completion_token_ids)]
        == [*before.prompt_token_ids, *before.completion_token_ids]
        for before, now in pairwise(calls)
    )


THREE = (
    Answer(text="I look.", tool_calls=[("Bash", ODD)]),
    Answer(tool_calls=[("Bash", ODD), ("Bash", '{"command": "pwd"}')]),
    Answer(text="Done."),
)


async def test_a_tool_session_of_anthropics_api_is_one_context() -> None:
    async with capturing(session(*THREE)) as (engine, r, box):
        harness = Anthropic(box)
        await harness.say("go")
        await harness.results("a.txt")
        await harness.results("a.txt", "/tmp")
        calls = r.recorder.calls
        assert [c.continuation for c in calls] == ["none", "exact", "exact"]
        assert [c.fallback for c in calls] == ["first_call", None, None]
        assert [c.parent_call_id for c in calls] == [None, calls[0].call_id, calls[1].call_id]
        assert all("retokenised" in c.edits for c in calls[1:])
        assert exactly(calls)
        # The engine's own record: these were its prompts.
        assert [list(c.prompt_token_ids) for c in calls] == [c.prompt_token_ids for c in engine.calls]
        assert all(c.tokenizer for c in calls)
        assert len(engine.renders) == 2  # none for the first call, one for each further one


async def test_a_tool_session_of_the_responses_api_is_one_context() -> None:
    async with capturing(session(*THREE)) as (engine, r, box):
        tools = [{"type": "function", "name": "Bash", "parameters": TOOL}]
        items: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
        for _ in THREE:
            async with box.http() as http:
                body = {"model": "gpt-x", "input": items, "tools": tools}
                async with http.post(RESPONSES, json=body) as response:
                    output = (await response.json())["output"]
            items += output
            items += [
                {"type": "function_call_output", "call_id": item["call_id"], "output": "ok"}
                for item in output
                if item["type"] == "function_call"
            ]
        calls = r.recorder.calls
        assert [(c.continuation, c.fallback) for c in calls[1:]] == [("exact", None)] * 2
        assert exactly(calls)
        assert [list(c.prompt_token_ids) for c in calls] == [c.prompt_token_ids for c in engine.calls]


async def test_two_sub_agents_with_equal_prefixes_interleaved() -> None:
    answers = [Answer(tool_calls=[("Bash", ODD)])] * 4 + [Answer(text="Done.")] * 2
    async with capturing(session(*answers)) as (_, r, box):
        agents = Anthropic(box), Anthropic(box)
        for agent in agents:
            await agent.say("go")
        for _ in range(2):
            await asyncio.gather(*(agent.results("a.txt") for agent in agents))
        calls = {c.call_id: c for c in r.recorder.calls}
        for agent in agents:
            told = [m["content"] for m in agent.messages if m["role"] == "assistant"]
            ids = [content[0]["id"].split("_")[1] for content in told[:2]]
            thread = [calls[ids[0]], calls[ids[1]]]
            last = next(c for c in calls.values() if c.parent_call_id == ids[1])
            assert thread[1].parent_call_id == ids[0]
            assert exactly([*thread, last])
        assert sum(c.continuation == "exact" for c in calls.values()) == 4


async def test_an_answer_in_its_canonical_ids_takes_one_lookup_and_is_the_rendering() -> None:
    script = session(Answer(text="Hello."), Answer(text="Bye."))
    async with capturing(script) as (engine, r, box):
        harness = Anthropic(box)
        await harness.say("hi")
        await harness.say("bye")
        call = r.recorder.calls[1]
        assert (call.continuation, call.edits) == ("exact", [])
        assert engine.calls[1].prompt_token_ids == engine.prompt_ids(engine.renders[0])


async def test_a_retry_renders_nothing() -> None:
    script = session(THREE[0], Answer(text="Done."), Answer(text="Done."))
    async with capturing(script) as (engine, r, box):
        harness = Anthropic(box)
        await harness.say("go")
        await harness.results("a.txt")
        del harness.messages[-1]
        await harness.ask()
        assert len(engine.renders) == 1
        assert engine.calls[1].prompt_token_ids == engine.calls[2].prompt_token_ids
        assert [c.continuation for c in r.recorder.calls] == ["none", "exact", "exact"]
        assert r.recorder.calls[1].parent_call_id == r.recorder.calls[2].parent_call_id


async def test_it_can_be_switched_off() -> None:
    async with capturing(session(*THREE), continuation=False) as (engine, r, box):
        harness = Anthropic(box)
        await harness.say("go")
        await harness.results("a.txt")
        assert engine.renders == []
        assert [c.fallback for c in r.recorder.calls] == ["first_call", "continuation_off"]
        assert not exactly(r.recorder.calls)


async def test_an_engine_that_starts_to_ignore_ids_is_found_out_and_given_none() -> None:
    async with capturing(session(*THREE)) as (engine, r, box):
        engine.takes_ids = False
        harness = Anthropic(box)
        await harness.say("go")
        await harness.results("a.txt")
        await harness.results("a.txt", "/tmp")
        calls = r.recorder.calls
        reasons = ["first_call", "engine_ignored_token_input", "engine_without_token_input"]
        assert [c.fallback for c in calls] == reasons
        assert {c.continuation for c in calls} == {"none"}
        assert [list(c.prompt_token_ids) for c in calls] == [c.prompt_token_ids for c in engine.calls]


async def test_an_engine_that_refuses_ids_is_asked_again_plainly() -> None:
    def script(request: dict[str, Any], nth: int) -> Answer:
        if "kv_transfer_params" in request and request.get("tools"):
            return Answer(status=400, error='{"error": {"message": "no ids"}}')
        return THREE[0] if len(request["messages"]) == 1 else Answer(text="Done.")

    async with capturing(script) as (_, r, box):
        harness = Anthropic(box)
        await harness.say("go")
        assert await harness.results("a.txt") == [{"type": "text", "text": "Done."}]
        call = r.recorder.calls[1]
        assert (call.status, call.continuation, call.fallback) == ("ok", "none", "engine_refused_token_input")


async def _error() -> web.Response:
    return web.Response(status=500)


async def _garbage() -> web.Response:
    return web.json_response({"token_ids": "1, 2"})


async def _silence() -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("fault", [_error, _garbage, _silence])
async def test_a_rendering_that_fails_is_done_without(fault: Any) -> None:
    async with capturing(session(*THREE), render_timeout_s=0.2) as (engine, r, box):
        harness = Anthropic(box)
        await harness.say("go")
        engine.render_fault = fault
        await harness.results("a.txt")
        call = r.recorder.calls[1]
        assert (call.status, call.continuation, call.fallback) == ("ok", "none", "render_failed")


async def test_a_harness_that_leaves_while_its_history_is_rendered() -> None:
    async with capturing(session(*THREE)) as (engine, r, box):
        harness = Anthropic(box)
        await harness.say("go")
        engine.render_fault = _silence
        asking = asyncio.ensure_future(harness.results("a.txt"))
        await until(lambda: len(engine.renders) == 1)
        asking.cancel()
        calls = await r.recorder.until_calls(2)
        assert (calls[1].status, calls[1].continuation, calls[1].delivered) == ("cancelled", "none", False)
        assert len(engine.calls) == 1


async def test_images_are_rendered() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    for images, fallback in ((True, "images"), (False, None)):
        script = session(Answer(text="Nice."), Answer(text="Bye."))
        async with capturing(script, images=images) as (_, r, box):
            harness = Anthropic(box)
            await harness.say([image])
            await harness.say("bye")
            assert r.recorder.calls[1].fallback == fallback


async def test_a_window_too_small_for_the_sampled_ids_is_left_to_the_rendering() -> None:
    async with capturing(session(*THREE), info={"max_model_len": 100}) as (_, r, box):
        harness = Anthropic(box)
        await harness.say("go")
        await harness.results("a.txt")
        call = r.recorder.calls[1]
        assert (call.status, call.fallback) == ("ok", "window_exceeded")
