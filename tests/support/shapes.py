"""Is an answer one of its provider's? The official SDKs' own types say so, and the order of events.

Everything here raises what a wrong answer deserves: an AssertionError, or the SDK's or the JSON parser's own.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from google.genai.types import GenerateContentResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from polar_mitm.sse import SSEDecoder

_CUT = ("response.failed", "error")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _is(kind: Any, value: Any) -> Any:
    return _adapter(kind).validate_python(value)


def is_reply(dialect: str, status: int, body: bytes) -> None:
    """A whole answer: of the provider's type, or an error in its shape."""
    value = json.loads(body)
    if status != 200:
        assert 400 <= status < 600, status
        is_error(dialect, value)
    elif dialect == "anthropic":
        _is(Message, value)
    elif dialect == "openai_chat":
        _is(ChatCompletion, value)
    elif dialect == "openai_responses":
        _is(Response, value)
    else:
        _is(GenerateContentResponse, value)


def is_error(dialect: str, value: Any) -> None:
    """An error's body. Harnesses show `message`, and decide by the rest."""
    error = value["error"]
    assert isinstance(error["message"], str) and error["message"]
    if dialect == "anthropic":
        assert value["type"] == "error" and isinstance(error["type"], str)
    elif dialect == "gemini":
        assert isinstance(error["code"], int) and isinstance(error["status"], str)
    else:
        assert isinstance(error["type"], str) and {"code", "param"} <= error.keys()


def is_stream(dialect: str, stream: bytes, *, whole: bool, array: bool = False, socket: bool = False) -> None:
    """A stream in its provider's events, which are named, numbered and nested as the provider's are.

    `whole`: the answer came to its end; otherwise it ends with an error. `array`: Gemini's other form.
    `socket`: the events are lines.
    """
    if dialect == "gemini":
        _gemini(stream, whole, array)
    elif dialect == "openai_chat":
        _chat(stream, whole)
    elif dialect == "anthropic":
        _anthropic(stream, whole)
    elif socket:
        _responses([json.loads(line) for line in stream.splitlines()], whole)
    else:
        events = SSEDecoder().feed(stream)
        values = [json.loads(event.data) for event in events]
        assert [event.event for event in events] == [value["type"] for value in values]
        _responses(values, whole)


def _anthropic(stream: bytes, whole: bool) -> None:
    events = [(event.event, json.loads(event.data)) for event in SSEDecoder().feed(stream)]
    assert all(name == value["type"] for name, value in events)
    if not whole:
        name, last = events.pop()
        assert name == "error"
        is_error("anthropic", last)
    open_block, num_blocks, names = None, 0, []
    for name, value in events:
        if name == "ping":
            continue
        _is(RawMessageStreamEvent, value)
        names.append(name)
        if name == "content_block_start":
            assert open_block is None and value["index"] == num_blocks
            open_block, num_blocks = num_blocks, num_blocks + 1
        elif name.startswith("content_block"):
            assert open_block is not None and value["index"] == open_block
            open_block = None if name == "content_block_stop" else open_block
    assert names[:1] == ["message_start"] and names.count("message_start") == 1
    if whole:
        assert open_block is None and names[-2:] == ["message_delta", "message_stop"]


def _responses(values: list[dict[str, Any]], whole: bool) -> None:
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    assert values[0]["type"] == "response.created"
    for value in values:
        _is(ResponseStreamEvent, value)
    last = values[-1]["type"]
    assert last in (("response.completed", "response.incomplete") if whole else _CUT)
    added = [v["output_index"] for v in values if v["type"] == "response.output_item.added"]
    done = [v["output_index"] for v in values if v["type"] == "response.output_item.done"]
    assert added == list(range(len(added)))
    if whole:
        assert sorted(done) == added or last == "response.incomplete"  # a call that was cut is never done
        items = {v["output_index"]: v["item"] for v in values if v["type"] == "response.output_item.done"}
        output = values[-1]["response"]["output"]
        assert len(output) == len(added) and all(output[index] == items[index] for index in done)


def _chat(stream: bytes, whole: bool) -> None:
    events = SSEDecoder().feed(stream)
    assert not any(event.event for event in events)
    last = events.pop().data
    if whole:
        assert last == b"[DONE]"
    else:
        is_error("openai_chat", json.loads(last))
    for event in events:
        value = json.loads(event.data)
        for choice in value["choices"]:  # custom tools are in the API's streams, but not in the SDK's types
            calls = choice["delta"].get("tool_calls", ())
            choice["delta"] |= {"tool_calls": [c for c in calls if c.get("type") != "custom"]}
        _is(ChatCompletionChunk, value)


def _gemini(stream: bytes, whole: bool, array: bool) -> None:
    if array:
        values = json.loads(stream)
    else:
        at = len(stream) if whole else stream.rindex(b'{"error":')  # bare, as its SDKs look for it
        values = [json.loads(event.data) for event in SSEDecoder().feed(stream[:at])]
        values += [] if whole else [json.loads(stream[at:])]
    if not whole:
        is_error("gemini", values.pop())
    for value in values:
        assert "error" not in value
        _is(GenerateContentResponse, value)
