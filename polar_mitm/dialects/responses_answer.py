"""What a Responses answer is made of besides its items: the response object, usage, errors.

Source: platform.openai.com/docs/api-reference/responses/object, and the official SDK's types.
"""

from __future__ import annotations

from typing import Any

import msgspec

from polar_mitm.dialects.ids import minted
from polar_mitm.dialects.responses_state import PreviousResponseNotFound
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.types import ChatRequest, Completion

_Wire = dict[str, Any]

# --- errors ---------------------------------------------------------------------------------------------

ERRORS: dict[ErrorKind, tuple[int, str, str | None]] = {
    "bad_request": (400, "invalid_request_error", None),
    "not_found": (404, "invalid_request_error", "not_found"),
    "too_large": (413, "invalid_request_error", "request_too_large"),
    "context_overflow": (400, "invalid_request_error", "context_length_exceeded"),
    "overloaded": (503, "service_unavailable_error", "server_is_overloaded"),
    "upstream": (500, "server_error", "server_error"),
    "internal": (500, "server_error", "server_error"),
}
"""HTTP status, `error.type` and `error.code` of each of our errors."""
BROKEN_OFF = "the engine broke off the answer"
"""The message of an error for an answer without an end."""

# Codex gives up at once on `server_is_overloaded` in a stream, but waits and tries again on a rate limit.
_STREAM_CODES: dict[ErrorKind, str] = {
    "bad_request": "invalid_prompt",
    "too_large": "invalid_prompt",
    "context_overflow": "context_length_exceeded",
    "overloaded": "rate_limit_exceeded",
}
# The service's own words, by which harnesses recognise an overflow, and compact.
_OVERFLOW = "Your input exceeds the context window of this model. Please adjust your input and try again."


def error_body(error: PolarError) -> bytes:
    """The body of an error answer."""
    _, kind, code = ERRORS[error.kind]
    param = "input" if error.kind == "context_overflow" else None
    if isinstance(error, PreviousResponseNotFound):
        param, code = "previous_response_id", "previous_response_not_found"
    return msgspec.json.encode(
        {"error": {"message": _message(error), "type": kind, "param": param, "code": code}}
    )


def _message(error: PolarError) -> str:
    return f"{_OVERFLOW} ({error.message})" if error.kind == "context_overflow" else error.message


def stream_error(error: PolarError) -> _Wire:
    """The `error` of a response that failed in its stream."""
    message = _message(error)
    if error.kind == "overloaded" and error.retry_after_s is not None:
        message += f" Please try again in {error.retry_after_s}s."
    return {"code": _STREAM_CODES.get(error.kind, "server_error"), "message": message}


# --- the response object --------------------------------------------------------------------------------


def response_object(request: ChatRequest, call_id: str, created_at: float) -> _Wire:
    """A response just begun. Of the request it echoes what is short: instructions, tools and schemas, which
    the service repeats in three events of each stream, may be a hundred times the answer, and no client reads
    them back.
    """
    parallel = request.parallel_tool_calls
    asked = request.sampling
    return {
        "id": minted("resp", call_id),
        "object": "response",
        "created_at": int(created_at),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": asked.max_tokens,
        "model": request.model,
        "output": [],
        "parallel_tool_calls": True if parallel is None else parallel,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": "detailed" if request.show_reasoning else None},
        "store": False,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": _choice(request),
        "tools": [],
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "metadata": {},
        **request.echo,
    }


def _choice(request: ChatRequest) -> str | _Wire:
    choice = request.tool_choice
    if choice.mode != "tool":
        return choice.mode
    tool = request.find_tool(choice.name or "")
    return {"type": tool.kind if tool else "function", "name": tool.name if tool else choice.name}


def usage_object(completion: Completion) -> _Wire:
    """Token counts: the engine's, or those of the ids where it gave none."""
    usage = completion.usage
    prompt = usage.prompt_tokens or len(completion.prompt_token_ids)
    sampled = usage.completion_tokens or len(completion.completion_token_ids)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": prompt + sampled,
    }
