"""The official openai SDK, reading what we emit."""

import importlib
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from polar_mitm.dialects.base import Dialect, Reply
from polar_mitm.dialects.ids import minted
from polar_mitm.dialects.openai_responses import OpenAIResponses
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.sse import SSEDecoder
from polar_mitm.types import ChatRequest, Completion, Delta
from tests.dialects.answers import gather

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
    return gather(CALL, request, deltas, **fields)


def stream_of(request: ChatRequest, deltas: list[Delta], **fields: Any) -> bytes:
    """The whole stream of an answer."""
    encoder = DIALECT.encoder(request, CALL, CREATED)
    middle = b"".join([encoder.start(), *map(encoder.delta, deltas)])
    return middle + encoder.finish(completion_of(request, deltas, **fields))


each_error = pytest.mark.parametrize(
    ("kind", "status", "type_", "code", "raised"),
    [
        ("bad_request", 400, "invalid_request_error", None, openai.BadRequestError),
        ("not_found", 404, "invalid_request_error", "not_found", openai.NotFoundError),
        ("too_large", 413, "invalid_request_error", "request_too_large", openai.APIStatusError),
        ("context_overflow", 400, "invalid_request_error", "context_length_exceeded", openai.BadRequestError),
        ("overloaded", 503, "service_unavailable_error", "server_is_overloaded", openai.InternalServerError),
        ("upstream", 500, "server_error", "server_error", openai.InternalServerError),
        ("internal", 500, "server_error", "server_error", openai.InternalServerError),
    ],
)
"""What the SDK makes of each of our errors, whichever of OpenAI's APIs says it."""


def check_error(
    dialect: Dialect,
    ask: Callable[[openai.OpenAI], object],
    kind: ErrorKind,
    status: int,
    type_: str,
    code: str | None,
    raised: type[Exception],
) -> None:
    """The reply for an error of this kind, and what `ask`ing raises when that is the answer."""
    reply = dialect.encode_error(PolarError(kind, "what happened"), CALL)
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["type"], error["code"]) == (status, type_, code)
    assert "what happened" in error["message"]
    assert reply.headers["x-request-id"] == minted("req", CALL)
    with pytest.raises(raised) as caught:
        ask(client(reply))
    assert isinstance(caught.value, openai.APIStatusError)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (status, code, type_)
