"""Side endpoints as the official SDKs find them: exact counts, models, refusals that they understand."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from aiohttp import web
from google import genai
from google.genai import errors, types

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, always
from polar_mitm.upstream.engine import EngineInfo
from tests.addons.test_sdks import SHELL, claude, gpt
from tests.support.rig import MESSAGES, RESPONSES, Box, Rig, ask, rig, trusting

COUNT = "https://api.anthropic.com/v1/messages/count_tokens"
GEMINI = "https://generativelanguage.googleapis.com/v1beta/models/gemini-x"
NOBODY = "http://127.0.0.1:9"
PROMPT = "Writé it,\n" * 20


@pytest.fixture(autouse=True)
def names_resolve_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the sandbox's resolver does: every name is the interceptor."""
    real = socket.getaddrinfo

    def here(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        known = name and name.endswith((".com", ".ai"))
        return real("127.0.0.1" if known else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    yield


class Running:
    """A box and its engine."""

    def __init__(self, **options: Any) -> None:
        self.engine = ScriptedEngine(always(Answer(text="ok")), **options)

    async def __aenter__(self) -> tuple[Box, Rig]:
        await self.engine.__aenter__()
        self._rig = rig(self.engine.url)
        r = await self._rig.__aenter__()
        return await r.box(), r

    async def __aexit__(self, *exc: Any) -> None:
        await self._rig.__aexit__(*exc)
        await self.engine.__aexit__(*exc)


def gemini(box: Box) -> genai.Client:
    return genai.Client(
        api_key="any",
        http_options=types.HttpOptions(
            base_url=f"https://generativelanguage.googleapis.com:{box.port}",
            async_client_args={"ssl": trusting(box.interceptor.ca_pem)},
        ),
    )


async def tokens_of_the_call(box: Box, r: Rig, url: str, body: dict[str, Any]) -> int:
    """What a count must be: the length of the prompt that the same request, made as a call, has."""
    async with box.http() as http, http.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        await response.read()
    return len((await r.recorder.until_calls(len(r.recorder.calls)))[-1].prompt_token_ids)


def only_side_traffic(r: Rig, *names: str) -> None:
    """No call was recorded; these requests were, as answered here."""
    assert r.recorder.calls == []
    assert [(e.verdict, e.layer, e.name) for e in r.recorder.events] == [
        ("stubbed", "path", n) for n in names
    ]


# --- counts ---------------------------------------------------------------------------------------------

TOOLS: list[Any] = [{"name": "Bash", "description": "run", "input_schema": SHELL}]
TALK: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "done"}]},
]


async def test_anthropic_counts_as_the_call_would_be() -> None:
    async with Running() as (box, r):
        asked: Any = {"model": "claude-x", "system": "Be brief.", "tools": TOOLS, "messages": TALK}
        async with claude(box) as client:
            counted = await client.messages.count_tokens(**asked)
            beta = await client.beta.messages.count_tokens(**asked)
        only_side_traffic(r, *["POST api.anthropic.com/v1/messages/count_tokens"] * 2)
        wanted = await tokens_of_the_call(box, r, MESSAGES, asked | {"max_tokens": 9, "stream": True})
        assert counted.input_tokens == beta.input_tokens == wanted > len(PROMPT)


async def test_responses_count_as_the_call_would_be() -> None:
    async with Running() as (box, r):
        tool: Any = {"type": "function", "name": "Bash", "parameters": SHELL, "strict": False}
        asked: Any = {"model": "gpt-x", "input": PROMPT, "instructions": "Be brief.", "tools": [tool]}
        async with gpt(box) as client:
            counted = await client.responses.input_tokens.count(**asked)
        only_side_traffic(r, "POST api.openai.com/v1/responses/input_tokens")
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == await tokens_of_the_call(box, r, RESPONSES, asked)


async def test_a_response_that_is_referred_to_counts() -> None:
    async with Running() as (box, r), gpt(box) as client:
        first = await client.responses.create(model="gpt-x", input=PROMPT)
        more: Any = {"model": "gpt-x", "input": "more", "previous_response_id": first.id}
        counted = await client.responses.input_tokens.count(**more)
        assert counted.input_tokens == await tokens_of_the_call(box, r, RESPONSES, more) > len(PROMPT)
        with pytest.raises(openai.BadRequestError, match="resp_x"):
            await client.responses.input_tokens.count(model="gpt-x", previous_response_id="resp_x")


async def test_gemini_counts_as_the_call_would_be() -> None:
    async with Running() as (box, r):
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
    async with Running() as (box, _):
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

    running = Running()
    async with running as (box, _):
        asked: Any = {"model": "claude-x", "messages": TALK, "tools": TOOLS}
        async with claude(box) as client:
            exact = await client.messages.count_tokens(**asked)
            running.engine.render_fault = fault
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
    running = Running()
    async with running.engine as engine:
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


# --- models ---------------------------------------------------------------------------------------------


async def test_anthropic_lists_the_engines_model() -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        async with claude(box) as client:
            (listed,) = [model async for model in client.models.list(limit=5)]
            assert (listed.id, listed.type, listed.max_input_tokens) == ("scripted", "model", 1 << 20)
            assert (await client.models.retrieve("claude-opus-5-5")).id == "claude-opus-5-5"
        only_side_traffic(
            r, "GET api.anthropic.com/v1/models", "GET api.anthropic.com/v1/models/claude-opus-5-5"
        )


async def test_openai_lists_the_engines_model() -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        async with gpt(box) as client:
            (listed,) = [model async for model in client.models.list()]
            assert (listed.id, listed.object) == ("scripted", "model")
            assert listed.model_extra is not None and listed.model_extra["max_model_len"] == 1 << 20
            assert (await client.models.retrieve("qwen/qwen3")).id == "qwen/qwen3"


async def test_gemini_lists_the_engines_model() -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        client = gemini(box)
        (listed,) = [model async for model in await client.aio.models.list(config={"page_size": 5})]
        assert (listed.name, listed.input_token_limit) == ("models/scripted", 1 << 20)
        assert listed.supported_actions == ["generateContent", "countTokens"]
        one = await client.aio.models.get(model="gemini-x")
        assert one.name == "models/gemini-x"


# --- refusals -------------------------------------------------------------------------------------------


async def test_embeddings_are_refused_in_words() -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        async with gpt(box) as client:
            with pytest.raises(openai.NotFoundError, match="embeddings are not served"):
                await client.embeddings.create(model="text-embedding-3-small", input="x")
        google = gemini(box)
        with pytest.raises(errors.ClientError, match="embeddings are not served") as refused:
            await google.aio.models.embed_content(model="gemini-embedding-001", contents="x")
        assert refused.value.code == 404
        assert [event.verdict for event in r.recorder.events] == ["refused"] * 2


async def test_batches_are_refused_in_words() -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        async with claude(box) as client:
            with pytest.raises(anthropic.NotFoundError, match="only messages"):
                await client.messages.batches.list()
        (event,) = r.recorder.events
        assert (event.verdict, event.detail) == ("refused", "404: other services of the API")


# --- harnesses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "url", "status", "answer"),
    [
        ("POST", "https://play.googleapis.com/log?format=json&hasfast=true", 200, {}),
        ("POST", "https://ab.chatgpt.com/otlp/v1/metrics", 200, {}),
        ("POST", "https://auth.openai.com/oauth/token", 200, {}),
        ("POST", "https://gb4w8c3ygj-default-sea.rum.aliyuncs.com/v2/rum", 200, {}),
        ("GET", "https://chatgpt.com/backend-api/codex/models?client_version=0.169.0", 200, {"models": []}),
        (
            "GET",
            "https://api.anthropic.com/api/claude_code/organizations/metrics_enabled",
            200,
            {"metrics_logging_enabled": False},
        ),
        ("GET", "https://models.opencode.ai/api.json", 404, None),
        ("GET", "https://chatgpt.com/backend-api/wham/usage", 404, None),
        ("GET", "https://api.anthropic.com/api/claude_code/settings", 404, None),
    ],
)
async def test_what_harnesses_ask_besides(method: str, url: str, status: int, answer: Any) -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        async with box.http() as http, http.request(method, url, data=b"{}") as response:
            assert response.status == status
            said = await response.json()
            assert said == answer if answer is not None else "error" in said
        only_side_traffic(r, f"{method} {url.removeprefix('https://').partition('?')[0]}")
        assert box.session.refused == {}


async def test_the_login_probe_names_the_account_of_the_login() -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        url = "https://chatgpt.com/backend-api/wham/accounts/check"
        async with box.http() as http:
            for headers, account in (({"ChatGPT-Account-Id": "acct-1"}, "acct-1"), ({}, "account")):
                async with http.get(url, headers=headers) as response:
                    said = await response.json()
                assert said["default_account_id"] == said["accounts"][0]["id"] == account


@pytest.mark.parametrize(
    "url",
    [
        "https://play.googleapis.com/store/apps",
        "https://ab.chatgpt.com/v1/responses",
        "https://auth.openai.com/v1/messages",
        "https://models.opencode.ai/v1beta/models/x:generateContent",
    ],
)
async def test_a_host_of_telemetry_serves_no_model(url: str) -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        async with box.http() as http, http.post(url, json=ask(MESSAGES)) as response:
            assert response.status == 404
        assert r.recorder.calls == [] and r.recorder.events[0].verdict == "refused"


async def test_other_hosts_stay_unknown() -> None:
    async with rig(NOBODY) as r:
        box = await r.box()
        async with box.http() as http:
            for host in ("registry.npmjs.org", "github.com", "x.play.googleapis.com"):
                with pytest.raises(aiohttp.ClientConnectionError):
                    await http.get(f"https://{host}/")
        assert {(e.verdict, e.layer) for e in r.recorder.events} == {("refused", "tls")}


async def test_the_engine_is_asked_for_nothing_but_ids() -> None:
    running = Running()
    async with running as (box, _):
        async with claude(box) as client:
            counted = await client.messages.count_tokens(model="m", messages=TALK)
        (rendered,) = running.engine.renders
        assert running.engine.calls == []
        text = byte_tokens.render(rendered["messages"], rendered.get("tools"), generate=True)
        assert len(byte_tokens.encode(text)) == counted.input_tokens
