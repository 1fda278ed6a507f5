"""Canonical answer to Chat Completions wire: the whole answer, errors, and what a stream shares with them.

Source: platform.openai.com/docs/api-reference/chat/object, and the official SDK's types.

Reasoning is given twice, as `reasoning_content` (DeepSeek, DashScope) and as `reasoning` (OpenRouter, vLLM):
clients read the one that they know, and those that know both take the first that is not empty. OpenRouter's
clients give reasoning back only as the `reasoning_details` that they were given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from polar_mitm.dialects.chat_request import DETAILS
from polar_mitm.dialects.chat_tools import FUNCTIONS
from polar_mitm.dialects.custom_tool import unwrap
from polar_mitm.dialects.ids import minted
from polar_mitm.dialects.openai_logprobs import logprob_objects
from polar_mitm.dialects.responses_answer import ERRORS
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, Completion, TokenLogprob, ToolCall

_encode = msgspec.json.Encoder().encode
_Wire = dict[str, Any]

# --- errors ---------------------------------------------------------------------------------------------

# The service's own words, by which harnesses recognise an overflow, and compact.
_OVERFLOW = "This model's maximum context length"
_ADVICE = "Please reduce the length of the messages."


def error_body(error: PolarError) -> bytes:
    """The body of an error answer, and the data of the event that breaks off a stream."""
    _, kind, code = ERRORS[error.kind]
    message, param = error.message, None
    if error.kind == "context_overflow":
        param = "messages"
        if not message.startswith(_OVERFLOW):
            message = f"{_OVERFLOW} is exceeded ({message})."
        if "reduce the length" not in message:
            message = f"{message} {_ADVICE}"
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


# --- the whole answer -----------------------------------------------------------------------------------


def broken(completion: Completion) -> bool:
    """Whether one of the answers has no end."""
    return any(c.finish_reason in ("abort", None) for c in (completion, *completion.others))


def whole(request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> bytes:
    """The body of a whole answer."""
    answers = enumerate((completion, *completion.others))
    head = head_object(request, call_id, created_at, "chat.completion")
    choices = [_choice(request, index, answer) for index, answer in answers]
    return _encode(head | {"choices": choices, "usage": usage_object(completion)})


def head_object(request: ChatRequest, call_id: str, created_at: float, kind: str) -> _Wire:
    """What a whole answer and each chunk begin with."""
    return {
        "id": minted("chatcmpl", call_id),
        "object": kind,
        "created": int(created_at),
        "model": request.model,
    }


def _choice(request: ChatRequest, index: int, completion: Completion) -> _Wire:
    answer = completion.message
    calls = answer.tool_calls
    message: _Wire = {
        "role": "assistant",
        "content": answer.text or (None if calls else ""),
        "refusal": None,
        "annotations": [],
    }
    if answer.reasoning and request.show_reasoning:
        message |= reasoning_object(answer.reasoning, DETAILS in request.notes)
    if calls and FUNCTIONS in request.notes:
        message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        message["tool_calls"] = [_called(call) for call in calls]
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs_object(completion.shown_logprobs) if request.top_logprobs is not None else None,
        "finish_reason": finish_word(request, completion),
    }


def _called(call: ToolCall) -> _Wire:
    if call.kind == "custom":
        custom = {"name": call.name, "input": unwrap(call.arguments)}
        return {"id": call.id, "type": "custom", "custom": custom}
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def reasoning_object(text: str, details: bool) -> _Wire:
    """Reasoning as fields of a message or of what a chunk adds to it, with `reasoning_details` or without.

    Source: openrouter.ai/docs/guides/best-practices/reasoning-tokens. A `format` must be named: without one,
    clients take it for Anthropic's, and drop what has no signature.
    """
    names: _Wire = {"reasoning_content": text, "reasoning": text}
    if details:
        names["reasoning_details"] = [
            {"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}
        ]
    return names


def finish_word(request: ChatRequest, completion: Completion) -> str:
    """The `finish_reason` of an answer that has an end."""
    if completion.finish_reason in ("length", "content_filter"):
        return completion.finish_reason
    if not completion.message.tool_calls:
        return "stop"
    # Also after "stop": engines say so where a tool was forced.
    return "function_call" if FUNCTIONS in request.notes else "tool_calls"


def logprobs_object(tokens: Iterable[TokenLogprob]) -> _Wire:
    """The `logprobs` of a choice, whole or in part."""
    return {"content": logprob_objects(tokens), "refusal": None}


def usage_object(completion: Completion) -> _Wire:
    """Token counts of all answers to one prompt: the engine's, or those of the ids where it gave none."""
    usage = completion.usage
    prompt = usage.prompt_tokens or len(completion.prompt_token_ids)
    every = (completion, *completion.others)
    sampled = sum(c.usage.completion_tokens or len(c.completion_token_ids) for c in every)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(c.usage.reasoning_tokens for c in every)},
    }
