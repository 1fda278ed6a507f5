"""vLLM's chat completions: the body we send. `vllm_stream` reads the answer, `refusals` its errors.

Source: vLLM's OpenAI-compatible server (docs.vllm.ai, "Chat API"), fields `return_token_ids`, `logprobs`,
`prompt_token_ids`, `token_ids`. The engine is always asked to stream: a harness that hangs up must leave its
partial tokens behind, whether or not it asked for a stream itself.
"""

from __future__ import annotations

from typing import Any

import msgspec

from polar_mitm.types import (
    ChatRequest,
    ImagePart,
    Message,
    Sampling,
    Tool,
    ToolCall,
    engine_tool_name,
)
from polar_mitm.upstream.engine import EngineInfo

CHAT_PATH = "/v1/chat/completions"
MAX_TOP_LOGPROBS = 20
"""What vLLM gives unless it is started with another `--max-logprobs`, and what OpenAI's API gives at most."""


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
        choice = request.tool_choice
        body["tools"] = [_tool(t, strict=_calls(request)) for t in request.tools]
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
    if _calls(request):
        found.append("guided:tool_choice")
    if (request.top_logprobs or 0) > MAX_TOP_LOGPROBS:
        found.append("capped:top_logprobs")
    return found


def _may_call(request: ChatRequest) -> bool:
    return bool(request.tools) and request.tool_choice.mode != "none"


def _calls(request: ChatRequest) -> bool:
    return bool(request.tools) and request.tool_choice.mode in ("required", "tool")


def _top_logprobs(request: ChatRequest) -> int:
    # vLLM counts the sampled token, which it puts first: one more, and the likeliest are all there.
    return min(request.top_logprobs + 1, MAX_TOP_LOGPROBS) if request.top_logprobs else 0


def _tool(tool: Tool, *, strict: bool) -> dict[str, Any]:
    function: dict[str, Any] = {
        "name": tool.engine_name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    if strict:  # else vLLM's grammar for a call that must come takes any JSON as arguments, even null
        function["strict"] = True
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
