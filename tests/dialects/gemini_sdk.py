"""The official google-genai SDK, asking the dialect's decoder and reading what we emit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import httpx
from google import genai
from google.genai import types

from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.gemini import Gemini
from polar_mitm.types import ChatRequest, Completion, Delta, Message, TextPart, ToolCall, Usage
from tests.dialects.answers import split

CALL = "01JD0Z6Q3W8F4M2N5P7R9T1V3X"
DIALECT = Gemini()
SSE = "/v1beta/models/m:streamGenerateContent?alt=sse"
ARRAY = "/v1beta/models/m:streamGenerateContent"
WHOLE = "/v1beta/models/m:generateContent"

Respond = Callable[[ChatRequest], Reply]


def client(respond: Respond, api_version: str = "v1beta") -> genai.Client:
    """The SDK client of an API version; from here on `respond` answers its decoded requests."""
    sdk, answering = _client(api_version)
    answering[:] = [respond]
    return sdk


@cache  # making one takes longer than a test, and the SDK closes one that nobody holds
def _client(api_version: str) -> tuple[genai.Client, list[Respond]]:
    answering: list[Respond] = []

    def handle(sent: httpx.Request) -> httpx.Response:
        reply = answering[0](DIALECT.decode(sent.read(), sent.headers, sent.url.raw_path.decode()))
        return httpx.Response(reply.status, headers=reply.headers, content=reply.body)

    async def handle_async(sent: httpx.Request) -> httpx.Response:
        await sent.aread()
        return handle(sent)

    options = types.HttpOptions(
        api_version=api_version,
        client_args={"transport": httpx.MockTransport(handle)},
        async_client_args={"transport": httpx.MockTransport(handle_async)},
    )
    return genai.Client(api_key="none", http_options=options), answering


def answer(
    text: str = "",
    reasoning: str | None = None,
    calls: Iterable[tuple[str, str]] = (),
    call_id: str = CALL,
    **fields: Any,
) -> Completion:
    tool_calls = [ToolCall(f"call_{call_id}_{i}", name, args) for i, (name, args) in enumerate(calls)]
    content: Any = [TextPart(text)] if text else []
    message = Message("assistant", content, reasoning=reasoning, tool_calls=tool_calls)
    usage = Usage(prompt_tokens=30, completion_tokens=7, cached_tokens=10, reasoning_tokens=2)
    return Completion(message, **({"finish_reason": "stop", "usage": usage} | fields))


def streamed(request: ChatRequest, deltas: Iterable[Delta], completion: Completion) -> bytes:
    encoder = DIALECT.encoder(request, CALL, 0.0)
    return encoder.start() + b"".join(map(encoder.delta, deltas)) + encoder.finish(completion)


def responder(completion: Completion, size: int = 4) -> Respond:
    """Answers every request with `completion`, in the form that it asks for."""

    def respond(request: ChatRequest) -> Reply:
        if not request.stream:
            return DIALECT.encode(request, completion, CALL, 0.0)
        deltas = [d for k, c in enumerate((completion, *completion.others)) for d in split(c, size, k)]
        return Reply(200, streamed(request, deltas, completion), DIALECT.stream_headers(CALL, request))

    return respond


def joined(contents: Iterable[Any]) -> list[Any]:
    """The parts of a stream's contents as those of one answer: neighbouring texts of a kind are one."""
    parts: list[types.Part] = []
    for part in (p for content in contents for p in content.parts or ()):
        last = parts[-1] if parts else None
        texts = last is not None and last.text is not None and part.text is not None
        if last is not None and texts and bool(last.thought) == bool(part.thought):
            last.text = (last.text or "") + part.text
            last.thought_signature = last.thought_signature or part.thought_signature
        else:
            parts.append(part.model_copy())
    return parts
