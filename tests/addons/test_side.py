"""Side endpoints as the official SDKs and harnesses find them: models, refusals, logins, telemetry."""

from __future__ import annotations

from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from google import genai
from google.genai import errors, types

from tests.addons.test_sdks import claude, gpt, names_resolve_here  # noqa: F401
from tests.support.rig import MESSAGES, Box, Rig, ask, rig, trusting

NOBODY = "http://127.0.0.1:9"


def gemini(box: Box) -> genai.Client:
    return genai.Client(
        api_key="any",
        http_options=types.HttpOptions(
            base_url=f"https://generativelanguage.googleapis.com:{box.port}",
            async_client_args={"ssl": trusting(box.interceptor.ca_pem)},
        ),
    )


def only_side_traffic(r: Rig, *names: str) -> None:
    """No call was recorded; these requests were, as answered here."""
    assert r.recorder.calls == []
    assert [(e.verdict, e.layer, e.name) for e in r.recorder.events] == [
        ("stubbed", "path", n) for n in names
    ]


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
