"""Errors and headers of the Responses dialect, as the official SDK understands them."""

import json

import openai
import pytest

from polar_mitm.dialects.ids import minted
from polar_mitm.errors import ErrorKind, PolarError
from tests.dialects.responses_sdk import CALL, DIALECT, client


@pytest.mark.parametrize(
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
def test_each_error(kind: ErrorKind, status: int, type_: str, code: str | None, raised: type[Exception]):
    reply = DIALECT.encode_error(PolarError(kind, "what happened"), CALL)
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["type"], error["code"]) == (status, type_, code)
    assert "what happened" in error["message"]
    assert reply.headers["x-request-id"] == minted("req", CALL)
    with pytest.raises(raised) as caught:
        client(reply).responses.create(model="m", input="hi")
    assert isinstance(caught.value, openai.APIStatusError)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (status, code, type_)


def test_retry_after_and_a_call_without_an_id():
    reply = DIALECT.encode_error(PolarError("overloaded", "busy", retry_after_s=5))
    assert reply.headers == {"content-type": "application/json", "retry-after": "5"}


def test_an_overflow_is_said_in_the_services_words():
    error = json.loads(DIALECT.encode_error(PolarError("context_overflow", "9 > 8")).body)["error"]
    assert error["param"] == "input"
    assert (
        error["message"].startswith("Your input exceeds the context window") and "9 > 8" in error["message"]
    )


def test_stream_headers():
    headers = DIALECT.stream_headers(CALL)
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-request-id"] == minted("req", CALL)
