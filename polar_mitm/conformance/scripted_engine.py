"""A scripted stand-in for vLLM's OpenAI server, for fault injection and for runs without a model.

The wire shapes are those of vLLM 0.32 (`/v1/chat/completions` and its `/render`, `/v1/models`, `/tokenize`,
`/detokenize`, `/version`, `/health`): the first chunk carries the role and `prompt_token_ids`, each further
chunk `token_ids` and `logprobs.content`, also where the delta is empty because a parser holds the text back;
then usage, then `[DONE]`. As in vLLM, ids, logprobs and usage come only when asked for, and
`kv_transfer_params.prompt_token_ids` replaces the rendered prompt. What is answered is up to a `Script`;
`calls` is the engine's own record of what it sampled; clear it (after a probe, say) and the script's count
starts anew.

    async with ScriptedEngine(write_file_in_two_turns("hello.txt", "hi")) as engine:
        ...  # engine.url, engine.calls

    python -m polar_mitm.conformance.scripted_engine --port 0 --script write-file
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiohttp import web

from polar_mitm.conformance import byte_tokens, engine_wire
from polar_mitm.conformance.engine_wire import CREATED, Choice, EngineCall
from polar_mitm.conformance.scripts import Answer, Script, always, write_file_in_two_turns

MAX_TOP_LOGPROBS = 20  # vLLM's own default


class ScriptedEngine:
    """The server, as an async context manager; `url` is its base without `/v1`."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        model: str = "scripted",
        max_model_len: int = 1 << 20,
        images: bool = False,
        takes_ids: bool = True,
    ) -> None:
        """`takes_ids`: whether it heeds `kv_transfer_params`, which routers drop and old versions ignore."""
        self.script = script or always(Answer(text="ok"))
        self.model = model
        self.max_model_len = max_model_len
        self.images = images
        self.takes_ids = takes_ids
        self.renders: list[dict[str, Any]] = []
        self.render_fault: Callable[[], Awaitable[web.Response]] | None = None
        self.calls: list[EngineCall] = []
        self.url = ""
        self._host, self._port = host, port
        app = web.Application(client_max_size=1 << 30)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/chat/completions/render", self._render),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
                web.get("/health", self._health),
                web.get("/version", self._version),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self.url = f"http://{self._host}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()

    def prompt_ids(self, body: dict[str, Any]) -> list[int]:
        """The rendered prompt."""
        generate = body.get("add_generation_prompt", True)
        return byte_tokens.encode(byte_tokens.render(body["messages"], body.get("tools"), generate=generate))

    async def _render(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.renders.append(body)
        if self.render_fault is not None:
            return await self.render_fault()
        return web.json_response({"request_id": "chatcmpl-0", "token_ids": self.prompt_ids(body)})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _models(self, request: web.Request) -> web.Response:
        card = {
            "id": self.model,
            "object": "model",
            "created": CREATED,
            "owned_by": "vllm",
            "root": self.model,
        }
        return web.json_response(
            {"object": "list", "data": [{**card, "parent": None, "max_model_len": self.max_model_len}]}
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            generate = body.get("add_generation_prompt", True)
            text = byte_tokens.render(body["messages"], body.get("tools"), generate=generate)
        else:
            text = body["prompt"]
        ids = byte_tokens.encode(text)
        strings = [byte_tokens.decode([i]) for i in ids] if body.get("return_token_strs") else None
        return web.json_response(
            {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids, "token_strs": strings}
        )

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": byte_tokens.decode((await request.json())["tokens"])})

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        try:
            body = await http.json()
        except ValueError:
            return _error(400, "BadRequestError", "Invalid JSON")
        if body.get("model", self.model) != self.model:
            return _error(404, "NotFoundError", f"The model `{body['model']}` does not exist.", param="model")
        if not self.images and any(
            part.get("type") == "image_url"
            for message in body["messages"]
            if isinstance(message.get("content"), list)
            for part in message["content"]
        ):
            return _error(400, "BadRequestError", f"{self.model} is not a multimodal model")
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids") if self.takes_ids else None
        prompt_ids = given or self.prompt_ids(body)
        answer = self.script(body, len(self.calls))
        call = EngineCall(len(self.calls), self.model, body, prompt_ids)
        self.calls.append(call)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or math.inf
        if len(prompt_ids) + 1 > self.max_model_len:
            call.end("refused")
            return _error(
                400,
                "BadRequestError",
                f"This model's maximum context length is {self.max_model_len} tokens. However, your request "
                f"has {len(prompt_ids)} input tokens. Please reduce the length of the input messages.",
                param="input_tokens",
            )
        if problem := _unanswerable(body):
            call.end("refused")
            return _error(400, "BadRequestError", problem)
        made = engine_wire.choices(
            answer, body, call.number, min(limit, self.max_model_len - len(prompt_ids))
        )
        try:
            await asyncio.sleep(answer.first_token_delay_s)
            if answer.status != 200:
                call.end("refused")
                if isinstance(answer.error, str):
                    return web.Response(status=answer.status, text=answer.error, headers=answer.headers)
                if answer.error is not None:
                    return web.json_response(answer.error, status=answer.status, headers=answer.headers)
                return _error(answer.status, "InternalServerError", "scripted error", headers=answer.headers)
            ids = [[t.token_id for t in each.tokens] for each in made]
            call.completion_token_ids, *call.other_token_ids = ids
            if body.get("stream"):
                return await self._stream(http, answer, call, made)
            await asyncio.sleep(answer.chunk_delay_s * len(ids[0]) / answer.tokens_per_chunk)
            call.sent_token_ids = call.completion_token_ids
            call.end("finished")
            return web.json_response(engine_wire.whole(answer, call, made))
        except (asyncio.CancelledError, ConnectionError):
            call.end("cancelled")
            raise

    async def _stream(
        self, http: web.Request, answer: Answer, call: EngineCall, made: list[Choice]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        await asyncio.sleep(answer.silence_s)
        sent, garbage = 0, answer.garbage
        for chunk, num_tokens in engine_wire.stream(answer, call, made):
            if num_tokens and sent:
                await asyncio.sleep(answer.chunk_delay_s)
            await response.write(chunk)
            call.wire += chunk
            sent += num_tokens
            call.sent_token_ids = call.completion_token_ids[:sent]
            if answer.garbage_after_tokens is not None and sent >= answer.garbage_after_tokens and garbage:
                await response.write(garbage)
                garbage = b""
            if answer.break_after_tokens is not None and sent >= answer.break_after_tokens:
                call.end("broken")
                if http.transport is not None:
                    http.transport.close()
                return response
            if answer.error_after_tokens is not None and sent >= answer.error_after_tokens:
                call.end("broken")
                body = _error_json(500, "InternalServerError", "scripted error in the stream")
                call.wire += (last := f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n".encode())
                await response.write(last)
                return response
        call.end("finished")
        return response


def _unanswerable(body: dict[str, Any]) -> str | None:
    """What vLLM refuses of a request for several answers or for the likeliest tokens."""
    num, top = body.get("n", 1), body.get("top_logprobs") or 0
    if num < 1:
        return f"n must be at least 1, got {num}."
    if num > 1 and body.get("temperature") == 0:
        return f"n must be 1 when using greedy sampling, got {num}."
    if top > MAX_TOP_LOGPROBS:
        return f"Requested sample logprobs of {top}, which is greater than max allowed: {MAX_TOP_LOGPROBS}"
    return None


def _error_json(status: int, kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _error(
    status: int, kind: str, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    return web.json_response(_error_json(status, kind, message, param), status=status, headers=headers)


async def _serve(options: argparse.Namespace) -> None:
    script = (
        write_file_in_two_turns(options.path, options.content)
        if options.script == "write-file"
        else always(Answer(text=options.content))
    )
    engine = ScriptedEngine(script, host=options.host, port=options.port, model=options.model)
    async with engine:
        print(engine.url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--script", choices=["write-file", "say"], default="write-file")
    parser.add_argument("--path", default="hello.txt")
    parser.add_argument("--content", default="hello from the scripted engine\n")
    try:
        asyncio.run(_serve(parser.parse_args()))
    except KeyboardInterrupt:
        os._exit(0)


if __name__ == "__main__":
    main()
