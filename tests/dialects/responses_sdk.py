"""The official openai SDK, reading what we emit."""

import importlib
import json
from typing import Any

import openai
from openai.types.responses import Response

from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.openai_responses import OpenAIResponses
from polar_mitm.sse import SSEDecoder
from polar_mitm.types import ChatRequest, Completion, Delta, Message, TextPart, ToolCall, ToolCallDelta

CALL = "01JD0Z6Q3W8F4M2N5P7R9T1V3X"
CREATED = 1732100000.75
DIALECT = OpenAIResponses()


# The SDK's HTTP library is httpx or its successor, by version.
_http = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__)


def client(reply: Reply) -> openai.OpenAI:
    """An SDK client whose every request gets `reply`."""

    def answer(_: Any) -> Any:
        return _http.Response(reply.status, content=reply.body, headers=reply.headers)

    http = openai.DefaultHttpxClient(transport=_http.MockTransport(answer))
    return openai.OpenAI(
        api_key="none", base_url="https://api.openai.com/v1", max_retries=0, http_client=http
    )


def streaming(wire: bytes) -> openai.OpenAI:
    """An SDK client whose every request gets this stream."""
    return client(Reply(200, wire, DIALECT.stream_headers(CALL)))


def rebuilt(wire: bytes) -> tuple[list[Any], Response]:
    """All events of a stream that completes, and the response that the SDK's accumulator ends with."""
    with streaming(wire).responses.stream(model="m", input="hi") as stream:
        events = list(stream)
        return events, stream.get_final_response()


def events(wire: bytes) -> list[dict[str, Any]]:
    """The events of a stream as JSON, checked to be named and numbered as the API does."""
    decoded = [(e.event, json.loads(e.data)) for e in SSEDecoder().feed(wire)]
    assert all(name == data["type"] for name, data in decoded)
    assert [data["sequence_number"] for _, data in decoded] == list(range(len(decoded)))
    return [data for _, data in decoded]


def completion_of(request: ChatRequest, deltas: list[Delta], **fields: Any) -> Completion:
    """What the exchange makes of these deltas."""
    calls: dict[int, list[ToolCallDelta]] = {}
    for part in (p for d in deltas for p in d.tool_calls):
        calls.setdefault(part.index, []).append(part)
    tool_calls = []
    for index, parts in sorted(calls.items()):
        name = parts[0].name or ""
        tool = request.find_tool(name)
        kind, namespace = (tool.kind, tool.namespace) if tool else ("function", None)
        arguments = "".join(p.arguments for p in parts)
        own = f"call_{CALL}_{index}"
        tool_calls.append(ToolCall(own, tool.name if tool else name, arguments, kind, namespace))
    text = "".join(d.text for d in deltas)
    reasoning = "".join(d.reasoning for d in deltas) or None
    message = Message("assistant", [TextPart(text)] if text else [], reasoning, tool_calls)
    return Completion(message, **({"finish_reason": "tool_calls" if tool_calls else "stop"} | fields))


def stream_of(request: ChatRequest, deltas: list[Delta], **fields: Any) -> bytes:
    """The whole stream of an answer."""
    encoder = DIALECT.encoder(request, CALL, CREATED)
    middle = b"".join([encoder.start(), *map(encoder.delta, deltas)])
    return middle + encoder.finish(completion_of(request, deltas, **fields))
