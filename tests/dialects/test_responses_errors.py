"""Errors and headers of the Responses dialect, as the official SDK understands them."""

import json

from polar_mitm.dialects.ids import minted
from polar_mitm.errors import ErrorKind, PolarError
from tests.dialects.responses_sdk import CALL, DIALECT, check_error, each_error


@each_error
def test_each_error(kind: ErrorKind, status: int, type_: str, code: str | None, raised: type[Exception]):
    check_error(
        DIALECT, lambda sdk: sdk.responses.create(model="m", input="hi"), kind, status, type_, code, raised
    )


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
