"""The start-up probe: a fit engine is described, an unfit one is refused in words that help."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, Script, always
from polar_mitm.errors import EngineUnfit
from polar_mitm.upstream.engine import EngineInfo, Template
from polar_mitm.upstream.probe import probe
from tests.support.engine_bytes import events

# `<|im_start|>assistant` and a newline; a turn ends with `<|im_end|>`.
TEMPLATE = Template(",".join(map(str, byte_tokens.encode("<|im_start|>assistant\n"))).encode(), 2)
CALL = Answer(tool_calls=[("get_weather", '{"city": "Paris"}')])


def faulty(*, only_when: Callable[[dict[str, Any]], bool] = lambda _: True, **fault: Any) -> Script:
    """An engine that is fit but for requests like these."""

    def script(request: dict[str, Any], nth: int) -> Answer:
        return Answer(tool_calls=CALL.tool_calls, **(fault if only_when(request) else {}))

    return script


@pytest.mark.parametrize("images", [False, True])
async def test_a_fit_engine(images: bool) -> None:
    async with ScriptedEngine(always(CALL), max_model_len=5000, images=images) as engine:
        for url in (engine.url, engine.url + "/", engine.url + "/v1"):
            found = await probe(url)
            assert len(found.tokenizer) == 16
            assert found == EngineInfo(
                url=engine.url,
                model="scripted",
                max_model_len=5000,
                version="0.32.0",
                policy_version="scripted@vllm-0.32.0-scripted",
                images=images,
                tokenizer=found.tokenizer,
                template=TEMPLATE,
            )
        streamed = [call.request for call in engine.calls if call.request.get("stream")]
        with_tools = [r for r in streamed if "tools" in r]
        assert all(r["return_token_ids"] for r in streamed)
        assert all(r["logprobs"] for r in with_tools)
        assert {r["tool_choice"] for r in with_tools} == {"required", "auto"}


async def test_an_engine_that_ignores_ids_is_fit_but_continues_nothing() -> None:
    async with ScriptedEngine(always(CALL), takes_ids=False) as engine:
        assert (await probe(engine.url)).template is None


async def test_tokenizers_have_different_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ScriptedEngine(always(CALL)) as engine:
        one = (await probe(engine.url)).tokenizer
        monkeypatch.setattr(byte_tokens, "BYTE_OFFSET", 20)
        assert (await probe(engine.url)).tokenizer != one


async def test_a_model_is_chosen_or_missed_by_name() -> None:
    async with ScriptedEngine(always(CALL), model="tiny") as engine:
        assert (await probe(engine.url, "tiny")).model == "tiny"
        with pytest.raises(EngineUnfit, match="has no model 'big', only tiny"):
            await probe(engine.url, "big")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (faulty(omit_token_ids=True), r"does not return token_ids of \d+ tokens \(got 0\)"),
        (
            faulty(
                only_when=lambda r: bool(r.get("stream") and r.get("tool_choice") == "auto"),
                omit_token_ids=True,
            ),
            r"token_ids of \d+ tokens \(got 0\).* when streaming with a tool \(tool_choice auto\)",
        ),
        (
            faulty(
                only_when=lambda r: bool(r.get("stream") and r.get("tool_choice") == "required"),
                omit_token_ids=True,
            ),
            r"when streaming with a tool \(tool_choice required\)",
        ),
        (faulty(omit_logprobs=True), r"does not return logprobs \(got 0 for \d+ ids\)"),
        (faulty(omit_prompt_token_ids=True), "does not return prompt_token_ids when"),
        (
            faulty(omit_prompt_token_ids=True, omit_token_ids=True, omit_logprobs=True),
            "prompt_token_ids, token_ids of .*, logprobs .*return_token_ids, with no router in between",
        ),
        (faulty(break_after_tokens=3), "broke off its answer"),
        (faulty(error_after_tokens=3), "failed the probe: engine error: scripted error in the stream"),
        (faulty(garbage_after_tokens=3), "failed the probe: engine stream"),
        (faulty(status=500), "a streaming tool call .* failed: engine answered 500: scripted error"),
        (
            faulty(status=400, error='{"error": {"message": "no parser"}}'),
            "failed: the engine refused the request: no parser",
        ),
    ],
)
async def test_an_unfit_engine_is_refused(script: Script, words: str) -> None:
    async with ScriptedEngine(script) as engine:
        with pytest.raises(EngineUnfit, match=words):
            await probe(engine.url)


async def test_nobody_answers() -> None:
    with socket.socket() as taken:  # bound, not listening: refused for certain
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(EngineUnfit, match=r"no engine answers at .*\(polar-mitm engine up\)"):
            await probe(f"http://127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("url", ["", "nonsense", "http://", "ftp://127.0.0.1:1"])
async def test_no_url(url: str) -> None:
    with pytest.raises(EngineUnfit, match="no engine answers at"):
        await probe(url)


# --- servers that are no vLLM ----------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MODELS = {"object": "list", "data": [{"id": "m", "max_model_len": 100}]}


@asynccontextmanager
async def server(**routes: Handler) -> AsyncIterator[str]:
    """A server of `models`, `chat`, `version`, `weight_info`; 404 for what is not given."""
    paths = {"models": "/v1/models", "chat": "/v1/chat/completions"}
    app = web.Application()
    app.add_routes([web.route("*", paths.get(name, f"/{name}"), routes[name]) for name in routes])
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def says(body: Any = None, status: int = 200, text: str | None = None) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(body, status=status) if text is None else web.Response(text=text)

    return answer


def streams(data: bytes) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=data, content_type="text/event-stream")

    return answer


WHOLE = b"".join(events(CALL))


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ({}, "/v1/models answered 404: is this a vLLM server"),
        ({"models": says({"error": "key"}, 401)}, "/v1/models answered 401"),
        ({"models": says(text="<html>")}, "does not answer as an OpenAI-compatible engine"),
        ({"models": says([1])}, "does not answer as an OpenAI-compatible engine"),
        ({"models": says({"data": []})}, "does not answer as an OpenAI-compatible engine"),
        ({"models": says({"data": [{"name": "m"}]})}, "does not answer as an OpenAI-compatible engine"),
        ({"models": says(MODELS)}, "streaming tool call .* failed: engine answered 404"),
        ({"models": says(MODELS), "chat": says({"ok": True})}, "does not return prompt_token_ids, usage"),
        (
            {"models": says(MODELS), "chat": streams(WHOLE.replace(b"data: [DONE]\n\n", b""))},
            "does not return the end of the stream",
        ),
    ],
)
async def test_other_servers_are_refused(routes: dict[str, Handler], words: str) -> None:
    async with server(**routes) as url:
        with pytest.raises(EngineUnfit, match=words):
            await probe(url)


async def test_the_engines_own_weight_version_is_the_policy_version() -> None:
    routes = {
        "models": says(MODELS),
        "chat": streams(WHOLE),
        "weight_info": says({"weight_version": "step-12"}),
    }
    async with server(**routes) as url:
        assert (await probe(url)).policy_version == "step-12"


async def test_an_adapters_window_is_its_models() -> None:
    adapter = {"id": "policy", "parent": "m", "max_model_len": None}
    models = {"data": [{"id": "m", "max_model_len": 4096}, adapter]}
    async with server(models=says(models), chat=streams(WHOLE)) as url:
        assert (await probe(url, "policy")).max_model_len == 4096


async def test_an_engine_that_hangs_is_given_up() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()  # until the client leaves
        raise AssertionError

    async with server(models=says(MODELS), chat=hang) as url:
        with pytest.raises(EngineUnfit, match="did not answer in time"):
            await probe(url, timeout_s=0.3)
