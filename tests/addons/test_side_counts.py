"""Token counts as the official SDKs ask for them: those of the call that the same request would be."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, always
from polar_mitm.upstream.engine import EngineInfo
from tests.addons.test_sdks import SHELL, claude, gpt, names_resolve_here  # noqa: F401
from tests.addons.test_side import NOBODY, gemini, only_side_traffic
from tests.support.rig import MESSAGES, RESPONSES, Box, Rig, rig

COUNT = "https://api.anthropic.com/v1/messages/count_tokens"
GEMINI = "https://generativelanguage.googleapis.com/v1beta/models/gemini-x"
PROMPT = "Writé it,\n" * 20


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Box, Rig, ScriptedEngine]]:
    """A box, and the engine behind it."""
    async with ScriptedEngine(always(Answer(text="ok"))) as engine, rig(engine.url) as r:
        yield await r.box(), r, engine


async def tokens_of_the_call(box: Box, r: Rig, url: str, body: dict[str, Any]) -> int:
    """What a count must be: the length of the prompt that the same request, made as a call, has."""
    async with box.http() as http, http.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        await response.read()
    return len((await r.recorder.until_calls(len(r.recorder.calls)))[-1].prompt_token_ids)


TOOLS: list[Any] = [{"name": "Bash", "description": "run", "input_schema": SHELL}]
TALK: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "done"}]},
]


async def test_anthropic_counts_as_the_call_would_be() -> None:
    async with running() as (box, r, _):
        asked: Any = {"model": "claude-x", "system": "Be brief.", "tools": TOOLS, "messages": TALK}
        async with claude(box) as client:
            counted = await client.messages.count_tokens(**asked)
            beta = await client.beta.messages.count_tokens(**asked)
        only_side_traffic(r, *["POST api.anthropic.com/v1/messages/count_tokens"] * 2)
        wanted = await tokens_of_the_call(box, r, MESSAGES, asked | {"max_tokens": 9, "stream": True})
        assert counted.input_tokens == beta.input_tokens == wanted > len(PROMPT)


async def test_responses_count_as_the_call_would_be() -> None:
    async with running() as (box, r, _):
        tool: Any = {"type": "function", "name": "Bash", "parameters": SHELL, "strict": False}
        asked: Any = {"model": "gpt-x", "input": PROMPT, "instructions": "Be brief.", "tools": [tool]}
        async with gpt(box) as client:
            counted = await client.responses.input_tokens.count(**asked)
        only_side_traffic(r, "POST api.openai.com/v1/responses/input_tokens")
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == await tokens_of_the_call(box, r, RESPONSES, asked)


async def test_a_response_that_is_referred_to_counts() -> None:
    async with running() as (box, r, _), gpt(box) as client:
        first = await client.responses.create(model="gpt-x", input=PROMPT)
        more: Any = {"model": "gpt-x", "input": "more", "previous_response_id": first.id}
        counted = await client.responses.input_tokens.count(**more)
        assert counted.input_tokens == await tokens_of_the_call(box, r, RESPONSES, more) > len(PROMPT)
        with pytest.raises(openai.BadRequestError, match="resp_x"):
            await client.responses.input_tokens.count(model="gpt-x", previous_response_id="resp_x")


async def test_gemini_counts_as_the_call_would_be() -> None:
    async with running() as (box, r, _):
        client = gemini(box)  # one that nobody holds closes its connections
        counted = await client.aio.models.count_tokens(model="gemini-x", contents=PROMPT)
        contents = [{"role": "user", "parts": [{"text": PROMPT}]}]
        whole = {
            "model": "models/gemini-x",
            "contents": contents,
            "systemInstruction": {"parts": [{"text": "Be brief."}]},
            "tools": [{"functionDeclarations": [{"name": "Bash", "parametersJsonSchema": SHELL}]}],
        }
        body = {"generateContentRequest": whole}
        async with box.http() as http, http.post(f"{GEMINI}:countTokens", json=body) as response:
            inner = await response.json()
        only_side_traffic(
            r, *["POST generativelanguage.googleapis.com/v1beta/models/gemini-x:countTokens"] * 2
        )
        wanted = await tokens_of_the_call(box, r, f"{GEMINI}:generateContent", {"contents": contents})
        assert counted.total_tokens == wanted
        wanted = await tokens_of_the_call(box, r, f"{GEMINI}:generateContent", whole)
        assert inner["totalTokens"] == wanted > counted.total_tokens


async def test_a_compressed_count() -> None:
    async with running() as (box, _, _):
        body = gzip.compress(json.dumps({"model": "m", "messages": TALK}).encode())
        async with box.http() as http:
            async with http.post(COUNT, data=body, headers={"content-encoding": "gzip"}) as response:
                assert response.status == 200
                zipped = await response.json()
            async with http.post(COUNT, json={"model": "m", "messages": TALK}) as response:
                assert await response.json() == zipped


@pytest.mark.parametrize("status", [400, 404])
async def test_what_the_engine_does_not_render_is_counted_too(status: int) -> None:
    """What is longer than its window, and everything where it is an old one."""
    refused = {"error": {"message": "maximum context length is 64 tokens", "code": status}}

    async def fault() -> web.Response:
        return web.json_response(refused, status=status)

    async with running() as (box, _, engine):
        asked: Any = {"model": "claude-x", "messages": TALK, "tools": TOOLS}
        async with claude(box) as client:
            exact = await client.messages.count_tokens(**asked)
            engine.render_fault = fault
            assert await client.messages.count_tokens(**asked) == exact


@pytest.mark.parametrize(
    ("url", "body", "status", "word"),
    [
        (COUNT, b"{", 400, "truncated"),
        (COUNT, b'{"model": "m"}', 400, "messages"),
        (COUNT, b'{"model": "m", "messages": 5}', 400, "messages"),
        ("https://api.openai.com/v1/responses/input_tokens", b"[]", 400, ""),
        (f"{GEMINI}:countTokens", b'{"contents": 5}', 400, "contents"),
        (f"{GEMINI}:countTokens", b'{"generateContentRequest": null}', 400, ""),
        (COUNT, b" " * 5000, 413, ""),
    ],
)
async def test_a_bad_count_is_refused_as_a_bad_call_is(url: str, body: bytes, status: int, word: str) -> None:
    async with rig(NOBODY, max_body_bytes=4000) as r:
        box = await r.box()
        async with box.http() as http, http.post(url, data=body) as response:
            assert response.status == status
            assert word in (await response.json())["error"]["message"]
        ((event,), calls) = await r.recorder.until_events(1), r.recorder.calls
        assert (event.verdict, event.detail, calls) == ("stubbed", f"{status}: token count", [])


async def _nothing() -> web.Response:
    await asyncio.sleep(3600)
    raise AssertionError


async def _garbage() -> web.Response:
    return web.Response(text="<html>")


async def _down() -> web.Response:
    return web.Response(status=503)


@pytest.mark.parametrize("fault", [_nothing, _garbage, _down])
async def test_an_engine_that_cannot_count(fault: Callable[[], Awaitable[web.Response]]) -> None:
    engine = ScriptedEngine()
    engine.render_fault = fault
    async with engine, rig(engine.url, render_timeout_s=0.2) as r:
        box = await r.box()
        async with claude(box) as client:
            with pytest.raises(anthropic.APIStatusError) as refused:
                await client.messages.count_tokens(model="m", messages=TALK)
            assert refused.value.status_code == 529  # which harnesses try again


async def test_no_engine_at_all() -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        async with claude(box) as client:
            with pytest.raises(anthropic.APIStatusError) as refused:
                await client.messages.count_tokens(model="m", messages=TALK)
            assert refused.value.status_code == 529


# --- as usage is told -----------------------------------------------------------------------------------


async def test_counts_and_windows_are_told_as_usage_is() -> None:
    """What Claude Code believes in is larger than the engine's window: all is told as a share of that."""
    agent = {"user-agent": "claude-cli/2.1.328 (external, sdk-cli)"}
    asked: Any = {"model": "claude-opus-5-5", "messages": TALK, "tools": TOOLS}
    async with ScriptedEngine() as engine:
        info = EngineInfo(engine.url, "scripted", max_model_len=10_000)
        told = {}
        for usage in ("scaled", "engine"):
            async with rig(engine.url, engine=info, usage=usage) as r:
                box = await r.box()
                async with claude(box, default_headers=agent) as client:
                    counted = await client.messages.count_tokens(**asked)
                    model = await client.models.retrieve("claude-opus-5-5")
                    answer = await client.messages.create(**asked, max_tokens=100)
                assert answer.usage.input_tokens == counted.input_tokens
                told[usage] = (counted.input_tokens, model.max_input_tokens)
        assert told["engine"][1] == 10_000
        assert told["scaled"][1] == 1_000_000 and told["scaled"][0] > 100 * told["engine"][0]


async def test_the_engine_is_asked_for_nothing_but_ids() -> None:
    async with running() as (box, _, engine):
        async with claude(box) as client:
            counted = await client.messages.count_tokens(model="m", messages=TALK)
        (rendered,) = engine.renders
        assert engine.calls == []
        text = byte_tokens.render(rendered["messages"], rendered.get("tools"), generate=True)
        assert len(byte_tokens.encode(text)) == counted.input_tokens
