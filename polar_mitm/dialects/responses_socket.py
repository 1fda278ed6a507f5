"""The Responses API over WebSocket: the events of the stream as messages, one JSON text each.

Source: platform.openai.com/docs/guides/websocket-mode. A client sends `response.create` messages, whose
fields are those of the HTTP body, and gets the stream's events. In a record, the messages sent are lines.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec
from msgspec import Raw, Struct

from polar_mitm.dialects.base import Reply, StreamEncoder
from polar_mitm.dialects.ids import new_id
from polar_mitm.dialects.openai_responses import OpenAIResponses
from polar_mitm.dialects.responses_answer import ERRORS, error_body
from polar_mitm.dialects.responses_stream import ResponsesStream
from polar_mitm.errors import UNREADABLE, ErrorKind, PolarError
from polar_mitm.types import ChatRequest, Completion, Delta, ModelCall, Wire

PREWARM = "prewarm"
"""The note of a call that was to generate nothing."""

_IN_BAND: tuple[ErrorKind, ...] = ("bad_request", "not_found", "too_large")
_HTTP = OpenAIResponses()
_METADATA_HEADER = "ws_request_header_"


class Head(Struct):
    """What says what a message wants."""

    type: str = ""
    generate: bool | None = None
    model: str = ""


def head_of(message: bytes) -> Head:
    """The head of a message; where it cannot be read, which decoding then says, of a `response.create`."""
    try:
        return msgspec.json.decode(message, type=Head)
    except UNREADABLE:
        return Head("response.create")


def headers_of(wire: Wire) -> dict[str, str]:
    """The headers of one message: the connection's, and those in its `client_metadata`, which win.

    Codex names the caller there, since a connection may serve several.
    """
    headers = {name.lower(): value for name, value in wire.request_headers}
    try:
        fields = msgspec.json.decode(wire.request_body, type=dict[str, Raw])
        metadata = msgspec.json.decode(fields.get("client_metadata", b"{}"), type=dict[str, Raw])
        texts = {
            name: msgspec.json.decode(value, type=str)
            for name, value in metadata.items()
            if bytes(value).startswith(b'"')
        }
    except UNREADABLE:
        return headers
    for name, text in texts.items():
        if name.startswith(_METADATA_HEADER):
            name = name.removeprefix(_METADATA_HEADER).replace("_", "-")
        if name.startswith("x-"):
            headers[name.lower()] = text
    return headers


def prewarm(wire: Wire) -> ModelCall | None:
    """The call, answered, of a prewarm: it generates nothing, and is referred to. None for others."""
    head = head_of(wire.request_body)
    if head.generate is not False:
        return None
    call_id, at = new_id(), time.time()
    stream = ResponsesStream(ChatRequest(head.model, []), call_id, at)
    wire.status, wire.response_body = 200, _lines(stream.start() + stream.end_empty())
    wire.chunk_sizes, wire.chunk_at_ms = [len(wire.response_body)], [0.0]
    return ModelCall(
        call_id,
        "",
        0,
        ResponsesSocket.name,
        f"{wire.method} {wire.path.partition('?')[0]}",
        "ok",
        model_requested=head.model,
        role="auxiliary",
        stream=True,
        delivered=True,
        notes=[PREWARM],
        started_at=at,
        ended_at=at,
        wire=wire,
    )


def unknown_message(kind: str) -> bytes:
    """The answer to a message that is no `response.create`."""
    error = PolarError("bad_request", f"type: unknown message type {kind[:64]!r}")
    return SOCKET.encode_error(error).body


class ResponsesSocket:
    """The `Dialect` of messages on a WebSocket; `encode_error` gives the message to send as the body."""

    name = _HTTP.name
    tool_id_prefix = _HTTP.tool_id_prefix

    def decode(self, body: bytes, headers: Mapping[str, str], path: str) -> ChatRequest:
        request = _HTTP.decode(body, headers, path)
        request.stream = True  # there is no other way
        return request

    def encoder(self, request: ChatRequest, call_id: str, created_at: float) -> StreamEncoder:
        return _Messages(_HTTP.encoder(request, call_id, created_at))

    def encode(self, request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> Reply:
        return _HTTP.encode(request, completion, call_id, created_at)

    def encode_error(self, error: PolarError, call_id: str = "") -> Reply:
        """Codex gives up on an `error` message with status 400, 429 or 503; whatever is worth another try
        comes as a failed response, on which it does try again.
        """
        status = ERRORS[error.kind][0]
        if error.kind in _IN_BAND:
            body = b'{"type":"error","status":%d,%b\n' % (status, error_body(error)[1:])
        else:
            body = _lines(ResponsesStream(ChatRequest("", []), call_id, time.time()).error(error))
        return Reply(status, body, {})

    def stream_headers(self, call_id: str, request: ChatRequest | None = None) -> dict[str, str]:
        return {}


class _Messages:
    """A stream encoder whose events are lines."""

    def __init__(self, events: StreamEncoder) -> None:
        self._events = events

    def start(self) -> bytes:
        return _lines(self._events.start())

    def delta(self, delta: Delta) -> bytes:
        return _lines(self._events.delta(delta))

    def keepalive(self) -> bytes:
        return b""

    def finish(self, completion: Completion) -> bytes:
        return _lines(self._events.finish(completion))

    def error(self, error: PolarError) -> bytes:
        return _lines(self._events.error(error))


def _lines(events: bytes) -> bytes:
    return b"".join(line[6:] + b"\n" for line in events.split(b"\n") if line.startswith(b"data: "))


SOCKET = ResponsesSocket()
