"""Messages on a WebSocket before they are decoded: any bytes, any fields."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.responses_socket import SOCKET, head_of, headers_of, prewarm, unknown_message
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.types import Wire
from tests.support import shapes

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
_names = st.sampled_from(
    ["type", "generate", "model", "input", "client_metadata", "x-a", "ws_request_header_x_b"]
)
_bodies = (
    st.binary(max_size=60)
    | st.dictionaries(_names, _json | st.dictionaries(_names, _json, max_size=3), max_size=4).map(
        lambda value: json.dumps(value).encode()
    )
    | st.binary(max_size=8).map(lambda raw: b'{"client_metadata":{"x-a":"' + raw + b'"}}')
    | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b'{"client_metadata":{"x-a":"\\ud800"}}'])
)


@given(_bodies)
def test_any_message_has_a_head_and_headers(body: bytes) -> None:
    wire = Wire("WS", "host", "/v1/responses", [("X-A", "own"), ("other", "b")], body)
    head, headers = head_of(body), headers_of(wire)
    assert headers["other"] == "b" and set(headers) <= {"x-a", "x-b", "other"}
    msgspec.json.encode(headers)
    json.loads(unknown_message(head.type))


@given(st.dictionaries(_names, _json, max_size=4))
def test_a_prewarm_of_anything_is_an_empty_response(fields: dict[str, Any]) -> None:
    body = json.dumps({**fields, "type": "response.create", "generate": False, "model": "m"}).encode()
    call = prewarm(Wire("WS", "host", "/v1/responses", [], body))
    assert call is not None and call.model_requested == "m"
    shapes.is_stream("openai_responses", call.wire.response_body, whole=True, socket=True)


@given(st.sampled_from(ErrorKind.__args__), st.text(max_size=30), st.none() | st.integers(0, 9))
def test_an_error_is_one_message(kind: ErrorKind, words: str, after: int | None) -> None:
    body = SOCKET.encode_error(PolarError(kind, words, retry_after_s=after)).body
    assert body.endswith(b"\n") and body.count(b"\n") == 1
    assert json.loads(body)["type"] in ("error", "response.failed")
