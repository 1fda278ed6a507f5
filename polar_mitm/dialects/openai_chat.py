"""The OpenAI Chat Completions API, as OpenAI and the many services that are compatible with it speak it.

Source: platform.openai.com/docs/api-reference/chat. Decoding lives in `chat_request`, what we answer in
`chat_stream` and `chat_answer`.
"""

from __future__ import annotations

from collections.abc import Mapping

from polar_mitm.dialects import chat_answer, chat_request, chat_stream
from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.ids import minted
from polar_mitm.dialects.responses_answer import BROKEN_OFF, ERRORS
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, Completion


class OpenAIChat:
    """The `Dialect` of Chat Completions; see `base.Dialect` for the contract of each method."""

    name = "openai_chat"
    tool_id_prefix = "call"

    def decode(self, body: bytes, headers: Mapping[str, str], path: str) -> ChatRequest:
        return chat_request.decode(body, path)

    def encoder(self, request: ChatRequest, call_id: str, created_at: float) -> chat_stream.ChatStream:
        return chat_stream.ChatStream(request, call_id, created_at)

    def encode(self, request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> Reply:
        if chat_answer.broken(completion):
            return self.encode_error(PolarError("upstream", BROKEN_OFF), call_id)
        body = chat_answer.whole(request, completion, call_id, created_at)
        return Reply(200, body, _headers("application/json", call_id))

    def encode_error(self, error: PolarError, call_id: str = "") -> Reply:
        headers = _headers("application/json", call_id)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        return Reply(ERRORS[error.kind][0], chat_answer.error_body(error), headers)

    def stream_headers(self, call_id: str, request: ChatRequest | None = None) -> dict[str, str]:
        return _headers("text/event-stream; charset=utf-8", call_id) | {"cache-control": "no-cache"}


def _headers(content_type: str, call_id: str) -> dict[str, str]:
    own = {"x-request-id": minted("req", call_id)} if call_id else {}
    return {"content-type": content_type, **own}
