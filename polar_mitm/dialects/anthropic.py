"""The Anthropic Messages API: `POST /v1/messages`, streaming and not.

Source: platform.claude.com/docs/en/api/messages (request, answer, errors, streaming). Decoding lives in
`anthropic_request`, what we answer in `anthropic_answer`.
"""

from __future__ import annotations

from collections.abc import Mapping

from polar_mitm.dialects import anthropic_answer, anthropic_request
from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.ids import minted
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, Completion


class Anthropic:
    """The `Dialect` of Anthropic Messages; see `base.Dialect` for the contract of each method."""

    name = "anthropic"
    tool_id_prefix = "toolu"

    def decode(self, body: bytes, headers: Mapping[str, str], path: str) -> ChatRequest:
        return anthropic_request.decode(body)

    def encoder(
        self, request: ChatRequest, call_id: str, created_at: float
    ) -> anthropic_answer.AnthropicStream:
        return anthropic_answer.AnthropicStream(request, call_id)

    def encode(self, request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> Reply:
        return Reply(200, anthropic_answer.message(request, completion, call_id), _json_headers(call_id))

    def encode_error(self, error: PolarError, call_id: str = "") -> Reply:
        headers = _json_headers(call_id)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        return Reply(
            anthropic_answer.ERRORS[error.kind][0], anthropic_answer.error_body(error, call_id), headers
        )

    def stream_headers(self, call_id: str, request: ChatRequest | None = None) -> dict[str, str]:
        return {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "request-id": minted("req", call_id),
        }


def _json_headers(call_id: str) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    if call_id:
        headers["request-id"] = minted("req", call_id)
    return headers
