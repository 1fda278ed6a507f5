"""Canonical answer to Anthropic Messages wire: the event stream, the whole message, errors.

Source: platform.claude.com/docs/en/build-with-claude/streaming and .../api/errors.

Reasoning always becomes a `thinking` block with a non-empty signature, because harnesses drop unsigned
thinking or turn it into text. Where the request asked for no visible thinking (`display: "omitted"`,
`disabled`, or none configured) the block's text is empty and the signature seals it, so that the history
that comes back still holds it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from polar_mitm import sse
from polar_mitm.dialects.ids import minted, seal
from polar_mitm.dialects.tool_input import as_object
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.types import ChatRequest, Completion, Delta, Message, ToolCallDelta

ERRORS: dict[ErrorKind, tuple[int, str]] = {
    "bad_request": (400, "invalid_request_error"),
    "not_found": (404, "not_found_error"),
    "too_large": (413, "request_too_large"),
    "context_overflow": (400, "invalid_request_error"),
    "overloaded": (529, "overloaded_error"),
    "upstream": (500, "api_error"),
    "internal": (500, "api_error"),
}
"""HTTP status and `error.type` of each of our errors."""

# The service's own words, by which harnesses recognise what to do about it: compact; ask again.
_WORDS: dict[ErrorKind, str] = {
    "context_overflow": "prompt is too long",
    "upstream": "Internal server error",
    "internal": "Internal server error",
}
_EMPTY_TEXT = {"type": "text", "text": ""}

_encode = msgspec.json.Encoder().encode


def error_body(error: PolarError, call_id: str) -> bytes:
    """The body of an error answer, and the data of an `error` event."""
    message, words = error.message, _WORDS.get(error.kind, "")
    if not message.startswith(words):
        message = f"{words}: {message}"
    return _encode(
        {
            "type": "error",
            "error": {"type": ERRORS[error.kind][1], "message": message},
            "request_id": minted("req", call_id) if call_id else None,
        }
    )


def message(request: ChatRequest, completion: Completion, call_id: str) -> bytes:
    """The body of a whole answer."""
    answer = completion.message
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        shown = request.show_reasoning
        content.append(
            {
                "type": "thinking",
                "thinking": answer.reasoning if shown else "",
                "signature": seal(call_id, None if shown else answer.reasoning),
            }
        )
    if answer.text:
        content.append({"type": "text", "text": answer.text})
    content += (
        {"type": "tool_use", "id": c.id, "name": c.name, "input": as_object(c.arguments)}
        for c in answer.tool_calls
    )
    reason, sequence = _stop(request, completion)
    head = _head(request, call_id, content or [_EMPTY_TEXT], _usage(completion))
    return _encode(head | {"stop_reason": reason, "stop_sequence": sequence})


def _head(
    request: ChatRequest, call_id: str, content: list[dict[str, Any]], usage: dict[str, int]
) -> dict[str, Any]:
    return {
        "id": minted("msg", call_id),
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _stop(request: ChatRequest, completion: Completion) -> tuple[str, str | None]:
    """`stop_reason` and `stop_sequence`."""
    reason, matched = completion.finish_reason, completion.stop_reason
    if reason == "content_filter":
        return "refusal", None
    if reason in ("length", "abort", None):
        return "max_tokens", None  # cut short: the nearest word the API has
    if completion.message.tool_calls:  # also after "stop": engines say so where a tool was forced
        return "tool_use", None
    if isinstance(matched, str) and matched in (request.sampling.stop or ()):
        return "stop_sequence", matched
    return "end_turn", None


def _usage(completion: Completion) -> dict[str, int]:
    """The API counts cached prompt tokens apart from `input_tokens`."""
    usage = completion.usage
    prompt = usage.prompt_tokens or len(completion.prompt_token_ids)
    return {
        "input_tokens": max(prompt - usage.cached_tokens, 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens or len(completion.completion_token_ids),
    }


_Kind: TypeAlias = str | int | None  # "thinking", "text", the index of a tool call, or no open block
_DELTAS: dict[str | int, bytes] = {
    "thinking": b'"type":"thinking_delta","thinking"',
    "text": b'"type":"text_delta","text"',
}
_ARGUMENTS = b'"type":"input_json_delta","partial_json"'
_PING = sse.encode(b'{"type":"ping"}', "ping")
_STOP = sse.encode(b'{"type":"message_stop"}', "message_stop")


def _event(data: dict[str, Any]) -> bytes:
    return sse.encode(_encode(data), data["type"])


class AnthropicStream:
    """The `StreamEncoder` of Anthropic Messages: one open content block at a time, numbered in order.

    An answer without any content gets one empty text block, for clients that read `content[0]`; Claude Code,
    pi and opencode treat it as they treat no blocks at all. `start` cannot know the prompt's length: the
    final `message_delta` carries the counts.
    """

    def __init__(self, request: ChatRequest, call_id: str) -> None:
        self._request = request
        self._call_id = call_id
        self._kind: _Kind = None
        self._num_blocks = 0
        self._before = b""  # an open block's delta event, up to the JSON string that differs
        self._hidden: list[str] = []
        self._called: set[int] = set()

    def start(self) -> bytes:
        head = _head(self._request, self._call_id, [], _usage(Completion(Message("assistant"))))
        return _event({"type": "message_start", "message": head})

    def delta(self, delta: Delta) -> bytes:
        """The events of one delta.

        Raises:
            PolarError: kind `upstream`, for a fragment of a tool call that another block had closed: its
                arguments would reach the harness cut short.
        """
        text = delta.text
        if text and self._kind == "text" and not delta.reasoning and not delta.tool_calls:
            return self._before + _encode(text) + b"}}\n\n"
        out = b""
        if delta.reasoning:
            if self._kind != "thinking":
                out += self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            if self._request.show_reasoning:
                out += self._before + _encode(delta.reasoning) + b"}}\n\n"
            else:
                self._hidden.append(delta.reasoning)
        if text:
            if self._kind != "text":
                out += self._open("text", _EMPTY_TEXT)
            out += self._before + _encode(text) + b"}}\n\n"
        for call in delta.tool_calls:
            if self._kind != call.index:
                out += self._open_call(call)
            if call.arguments:
                out += self._before + _encode(call.arguments) + b"}}\n\n"
        return out

    def keepalive(self) -> bytes:
        return _PING

    def finish(self, completion: Completion) -> bytes:
        reason, sequence = _stop(self._request, completion)
        end = {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": _usage(completion),
        }
        empty = b"" if self._num_blocks else self._open("text", _EMPTY_TEXT)
        return empty + self._close() + _event(end) + _STOP

    def error(self, error: PolarError) -> bytes:
        return sse.encode(error_body(error, self._call_id), "error")

    def _open_call(self, call: ToolCallDelta) -> bytes:
        if call.index in self._called:
            raise PolarError("upstream", f"the engine came back to tool call {call.index} after leaving it")
        self._called.add(call.index)
        wire_id = minted("toolu", self._call_id, call.index)
        return self._open(
            call.index, {"type": "tool_use", "id": wire_id, "name": call.name or "", "input": {}}
        )

    def _open(self, kind: str | int, block: dict[str, Any]) -> bytes:
        closed = self._close()
        index = self._num_blocks
        self._before = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{%s:'
            % (index, _DELTAS.get(kind, _ARGUMENTS))
        )
        self._kind = kind
        self._num_blocks += 1
        return closed + _event({"type": "content_block_start", "index": index, "content_block": block})

    def _close(self) -> bytes:
        if self._kind is None:
            return b""
        index, signed = self._num_blocks - 1, b""
        if self._kind == "thinking":
            signature = seal(self._call_id, None if self._request.show_reasoning else "".join(self._hidden))
            self._hidden.clear()
            delta = {"type": "signature_delta", "signature": signature}
            signed = _event({"type": "content_block_delta", "index": index, "delta": delta})
        self._kind = None
        return signed + _event({"type": "content_block_stop", "index": index})
