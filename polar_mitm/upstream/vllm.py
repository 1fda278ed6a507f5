"""vLLM's chat completions: the body we send, the stream we read. No IO here.

Source: vLLM's OpenAI-compatible server (docs.vllm.ai, "Chat API"), fields `return_token_ids`, `logprobs`,
`prompt_token_ids`, `token_ids`. The engine is always asked to stream: a harness that hangs up must leave its
partial tokens behind, whether or not it asked for a stream itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Generic, TypeVar, cast

import msgspec
from msgspec import Struct, field

from polar_mitm.errors import UNREADABLE, Overflow, PolarError
from polar_mitm.sse import EventTooLarge, SSEDecoder
from polar_mitm.token_ids import TokenIds
from polar_mitm.types import (
    ChatRequest,
    Delta,
    FinishReason,
    ImagePart,
    Message,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
    engine_tool_name,
)
from polar_mitm.upstream.engine import EngineInfo

CHAT_PATH = "/v1/chat/completions"
MAX_TOP_LOGPROBS = 20
"""What vLLM gives unless it is started with another `--max-logprobs`, and what OpenAI's API gives at most."""

# --- the body -------------------------------------------------------------------------------------------


def build_body(request: ChatRequest, sampling: Sampling, engine: EngineInfo) -> bytes:
    """The engine's request body. `sampling` is what will be used, already decided; see also `notes`."""
    body: dict[str, Any] = {
        "model": engine.model,
        "messages": [_message(m, engine.images) for m in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": _top_logprobs(request),
        "return_token_ids": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # A model's generation_config.json may set these silently; say what is meant.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    if request.n > 1:
        body["n"] = request.n
    if sampling.max_tokens is not None:
        body["max_tokens"] = sampling.max_tokens
    if sampling.stop:
        body["stop"] = sampling.stop
    if request.tools:
        body["tools"] = [_tool(t) for t in request.tools]
        choice = request.tool_choice
        body["tool_choice"] = (
            {"type": "function", "function": {"name": choice.name}} if choice.mode == "tool" else choice.mode
        )
        if request.parallel_tool_calls is False:
            body["parallel_tool_calls"] = False
    if request.response_schema is not None and not _may_call(request):
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": request.response_schema},
        }
    return msgspec.json.encode(body)


def notes(request: ChatRequest) -> list[str]:
    """What of a request the engine does otherwise than asked, or in a way that shapes what is sampled.

    `guided:json_schema`, `guided:tool_choice`: a grammar masks the logits, before vLLM takes even raw
    logprobs, so behaviour logprobs are not of the model's own distribution. `unguided:json_schema`: the
    schema is not enforced, because tools are offered and a grammar for the answer's text would rule out any
    call of them. `capped:top_logprobs`: fewer are shown than asked for.
    """
    found = []
    if request.response_schema is not None:
        found.append("unguided:json_schema" if _may_call(request) else "guided:json_schema")
    if request.tools and request.tool_choice.mode in ("required", "tool"):
        found.append("guided:tool_choice")
    if (request.top_logprobs or 0) > MAX_TOP_LOGPROBS:
        found.append("capped:top_logprobs")
    return found


def _may_call(request: ChatRequest) -> bool:
    return bool(request.tools) and request.tool_choice.mode != "none"


def _top_logprobs(request: ChatRequest) -> int:
    # vLLM counts the sampled token, which it puts first: one more, and the likeliest are all there.
    return min(request.top_logprobs + 1, MAX_TOP_LOGPROBS) if request.top_logprobs else 0


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.engine_name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _message(message: Message, images: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": _content(message, images)}
    if message.role == "tool":
        out["tool_call_id"] = message.tool_call_id or ""
    if message.reasoning:
        out["reasoning"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = [_tool_call(c) for c in message.tool_calls]
        out["content"] = out["content"] or None
    return out


def _content(message: Message, images: bool) -> str | list[dict[str, Any]]:
    if images and any(isinstance(p, ImagePart) for p in message.content):
        return [
            {"type": "image_url", "image_url": {"url": p.url}}
            if isinstance(p, ImagePart)
            else {"type": "text", "text": p.text}
            for p in message.content
        ]
    # A text-only engine refuses images, and the harness cannot know: say that there was one.
    return "\n".join("[image]" if isinstance(p, ImagePart) else p.text for p in message.content)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    if call.kind == "custom":
        arguments = msgspec.json.encode({"input": call.arguments}).decode()
    else:
        arguments = call.arguments if _is_json_object(call.arguments) else _wrap(call.arguments)
    function = {"name": engine_tool_name(call.name, call.namespace), "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _wrap(text: str) -> str:
    """Chat templates parse arguments and fail on anything but an object; keep a bad one as text."""
    return msgspec.json.encode({"__raw": text}).decode() if text.strip() else "{}"


# --- the stream -----------------------------------------------------------------------------------------


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(Struct):
    index: int = 0
    function: _Function = field(default_factory=_Function)


class _ChunkDelta(Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Logprob(Struct):
    logprob: float


class _ShownLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[_ShownLogprob] = field(default_factory=list)


P = TypeVar("P", _Logprob, _ShownLogprob)


class _Logprobs(Struct, Generic[P]):
    content: list[P] | None = None


class _Choice(Struct, Generic[P]):
    index: int = 0
    delta: _ChunkDelta = field(default_factory=_ChunkDelta)
    logprobs: _Logprobs[P] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _CompletionDetails(Struct):
    reasoning_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(Struct, Generic[P]):
    choices: list[_Choice[P]] = field(default_factory=list)
    prompt_token_ids: msgspec.Raw = msgspec.Raw(b"null")
    usage: _Usage | None = None
    error: Any = None
    system_fingerprint: str | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk[_Logprob]).decode
_decode_shown = msgspec.json.Decoder(_Chunk[_ShownLogprob]).decode
_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "abort": "abort",
}


class ChatStream:
    """The engine's event stream, bytes in, canonical deltas out. `done` once it has ended properly.

    `n` is how many answers were asked for; with `top_logprobs`, as in `ChatRequest`, deltas bring
    `shown_logprobs`.
    """

    def __init__(self, n: int = 1, top_logprobs: int | None = None) -> None:
        self._sse = SSEDecoder()
        self._n = n
        self._top = top_logprobs
        self.done = False
        self.fingerprint: str | None = None

    def feed(self, data: bytes) -> Iterable[Delta]:
        """Deltas of a chunk of bytes, one for each choice of each engine chunk.

        Raises:
            PolarError: kind `upstream`, for an error event or bytes that are no such stream.
        """
        if self.done:
            return
        too_large: EventTooLarge | None = None
        try:
            events = self._sse.feed(data)
        except EventTooLarge as error:
            events, too_large = error.events, error
        for event in events:
            if event.data == b"[DONE]":
                self.done = True
                return
            try:
                chunk = _decode_chunk(event.data) if self._top is None else _decode_shown(event.data)
            except UNREADABLE as error:
                raise PolarError("upstream", f"engine stream: {error}") from error
            if chunk.error is not None:
                raise PolarError("upstream", f"engine error: {error_text(chunk.error)}")
            self.fingerprint = chunk.system_fingerprint or self.fingerprint
            try:
                ids = _prompt_ids(chunk.prompt_token_ids)
            except ValueError as error:
                raise PolarError("upstream", f"engine stream: {error}") from error
            if not chunk.choices and (ids is not None or chunk.usage):
                yield Delta(prompt_token_ids=ids, usage=_usage(chunk.usage))
            for choice in chunk.choices:
                if not 0 <= choice.index < self._n:
                    raise PolarError("upstream", f"engine stream: choice {choice.index} of {self._n}")
                delta = _delta(choice)
                if choice is chunk.choices[0]:
                    delta.prompt_token_ids, delta.usage = ids, _usage(chunk.usage)
                if self._top is not None:
                    delta.shown_logprobs = _shown(choice, self._top)
                yield delta
        if too_large is not None:
            raise PolarError("upstream", f"engine stream: {too_large}") from too_large


def _prompt_ids(raw: msgspec.Raw) -> TokenIds | None:
    text = bytes(raw)
    return None if text == b"null" else TokenIds.from_json(text)


def _delta(choice: _Choice[Any]) -> Delta:
    delta = choice.delta
    out = Delta(
        text=delta.content or "",
        reasoning=delta.reasoning or delta.reasoning_content or "",
        choice=choice.index,
    )
    if delta.tool_calls:
        out.tool_calls = [
            ToolCallDelta(c.index, c.function.name, c.function.arguments or "") for c in delta.tool_calls
        ]
    if choice.token_ids:
        out.token_ids = choice.token_ids
    if choice.logprobs is not None and choice.logprobs.content:
        out.logprobs = [p.logprob for p in choice.logprobs.content]
    if choice.finish_reason is not None:
        out.finish_reason = _FINISH.get(choice.finish_reason, "stop")
        out.stop_reason = choice.stop_reason
    return out


def _shown(choice: _Choice[Any], top: int) -> list[TokenLogprob]:
    content = choice.logprobs.content if choice.logprobs is not None else None
    return [
        TokenLogprob(
            p.token,
            p.logprob,
            p.bytes,
            [
                TokenLogprob(t.token, t.logprob, t.bytes)
                for t in sorted(p.top_logprobs, key=lambda t: -t.logprob)[:top]
            ],
        )
        for p in content or ()
    ]


def _usage(usage: _Usage | None) -> Usage | None:
    if usage is None:
        return None
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens or 0,
        cached_tokens=(prompt.cached_tokens if prompt else None) or 0,
        reasoning_tokens=(completion.reasoning_tokens if completion else None) or 0,
    )


# --- refusals -------------------------------------------------------------------------------------------


def error_text(error: Any) -> str:
    """The engine's own words out of an error body or event, at most 500 characters."""
    if isinstance(error, dict):
        inner = error.get("error", error)
        error = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(cast(object, error))[:500]


# What versions of the engine say of a prompt, or a prompt and its answer, that the window does not hold.
_WINDOW = re.compile(
    r"maximum context length is (\d+)|maximum model length of (\d+)|maximum context length \((\d+)\)"
    r"|context length is only (\d+)"
)
_PROMPT = re.compile(
    r"(\d+) in the messages|(?:has|passed|contains)(?: at least)? (\d+) input tokens|\(length (\d+)\)"
    r"|Input length \((\d+)\)|(\d+) from the input|resulted in (\d+) tokens"
)


def _overflow(text: str) -> Overflow | None:
    """The prompt's length and the window, where the engine names both."""
    window, prompt = _WINDOW.search(text), _PROMPT.search(text)
    if window is None or prompt is None or window.lastindex is None or prompt.lastindex is None:
        return None
    return Overflow(int(prompt[prompt.lastindex]), int(window[window.lastindex]))


def rejection(status: int, body: bytes, retry_after_s: int) -> PolarError:
    """What an engine's non-200 answer means to a harness."""
    try:
        text = error_text(msgspec.json.decode(body))
    except UNREADABLE:
        text = body[:200].decode("utf-8", "replace") or "no body"
    if status == 400 and ("context length" in text or "longer than the maximum" in text):
        return PolarError("context_overflow", text, status=status, overflow=_overflow(text))
    if status in (400, 413, 422):
        return PolarError("bad_request", f"the engine refused the request: {text}", status=status)
    # Everything else is the engine's trouble, not the harness's: it may try again.
    message = f"engine answered {status}: {text}"
    return PolarError("overloaded", message, retry_after_s=retry_after_s, status=status)
