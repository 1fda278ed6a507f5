"""The Gemini API: `POST /v1beta/models/MODEL:generateContent` and `:streamGenerateContent`, every version.

Source: ai.google.dev/api/generate-content. Decoding lives in `gemini_request`, `gemini_history` and
`gemini_tools`, what we answer in `gemini_answer`.
"""

from __future__ import annotations

from collections.abc import Mapping

from polar_mitm.dialects import gemini_answer, gemini_request
from polar_mitm.dialects.base import Reply
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, Completion

_JSON = "application/json; charset=UTF-8"


class Gemini:
    """The `Dialect` of the Gemini API; see `base.Dialect` for the contract of each method."""

    name = "gemini"
    tool_id_prefix = "call"

    def decode(self, body: bytes, headers: Mapping[str, str], path: str) -> ChatRequest:
        return gemini_request.decode(body, path)

    def encoder(self, request: ChatRequest, call_id: str, created_at: float) -> gemini_answer.GeminiStream:
        return gemini_answer.GeminiStream(request, call_id)

    def encode(self, request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> Reply:
        return Reply(200, gemini_answer.whole(request, completion, call_id), {"content-type": _JSON})

    def encode_error(self, error: PolarError, call_id: str = "") -> Reply:
        headers = {"content-type": _JSON}
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        return Reply(gemini_answer.ERRORS[error.kind][0], gemini_answer.error_body(error), headers)

    def stream_headers(self, call_id: str, request: ChatRequest | None = None) -> dict[str, str]:
        array = request is not None and gemini_request.JSON_ARRAY in request.notes
        return {"content-type": _JSON if array else "text/event-stream", "cache-control": "no-cache"}
