"""The OpenAI Responses API: `POST /v1/responses` and Codex's `/backend-api/codex/responses`, over HTTP.

Source: platform.openai.com/docs/api-reference/responses. Decoding lives in `responses_request` and
`responses_tools`, what we answer in `responses_stream` and `responses_answer`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from polar_mitm.dialects import responses_answer, responses_request, responses_stream
from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.ids import minted
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, Completion


class OpenAIResponses:
    """The `Dialect` of OpenAI Responses; see `base.Dialect` for the contract of each method."""

    name = "openai_responses"
    tool_id_prefix = "call"

    def decode(self, body: bytes, headers: Mapping[str, str], path: str) -> ChatRequest:
        return responses_request.decode(body)

    def encoder(
        self, request: ChatRequest, call_id: str, created_at: float
    ) -> responses_stream.ResponsesStream:
        return responses_stream.stream(request, call_id, created_at)

    def encode(self, request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> Reply:
        response = responses_stream.whole(request, completion, call_id, created_at)
        if response["status"] == "failed":
            return self.encode_error(PolarError("upstream", responses_answer.BROKEN_OFF), call_id)
        return Reply(200, msgspec.json.encode(response), _json_headers(call_id))

    def encode_error(self, error: PolarError, call_id: str = "") -> Reply:
        headers = _json_headers(call_id)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        return Reply(responses_answer.ERRORS[error.kind][0], responses_answer.error_body(error), headers)

    def stream_headers(self, call_id: str, request: ChatRequest | None = None) -> dict[str, str]:
        return {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-request-id": minted("req", call_id),
        }


def _json_headers(call_id: str) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    if call_id:
        headers["x-request-id"] = minted("req", call_id)
    return headers
