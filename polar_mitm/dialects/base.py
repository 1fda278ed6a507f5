"""What a dialect is: one provider API, both ways, without IO.

A dialect decodes the harness's request into a `ChatRequest` and encodes the canonical answer into the
provider's wire format. It never sees the engine. One instance serves all calls; per-call state lives in the
`StreamEncoder` that it makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct, field

from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, Completion, Delta


class Reply(Struct):
    """A whole HTTP answer."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


class StreamEncoder(Protocol):
    """Turns canonical deltas into the provider's stream. Each method returns wire bytes, maybe none.

    Order of calls: `start`, any number of `delta`, then one of `finish` or `error`. The output of `finish`
    ends with the provider's terminal event, so a caller can hold it back until the call is recorded.
    Nothing that a client cannot know appears: no unknown event type, no unknown required field.
    """

    def start(self) -> bytes: ...

    def delta(self, delta: Delta) -> bytes: ...

    def keepalive(self) -> bytes:
        """Bytes that keep an idle client waiting, or b"" where the provider has no such event."""
        ...

    def finish(self, completion: Completion) -> bytes: ...

    def error(self, error: PolarError) -> bytes: ...


class Dialect(Protocol):
    """One provider API. `name` is stored on each call, such as `anthropic` or `openai_responses`.

    `tool_id_prefix` is the provider's prefix of tool-call ids (`toolu`, `call`): the id of tool call number
    n is `ids.minted(tool_id_prefix, call_id, n)`. Answer number k of a request for several has the call id
    `ids.sibling(call_id, k)`; a delta says by `choice` which answer it is of, a completion has `others`.
    Who makes a call is said by `roles.caller`.
    """

    name: str
    tool_id_prefix: str

    def decode(self, body: bytes, headers: Mapping[str, str], path: str) -> ChatRequest:
        """Provider request (content-decoded bytes) to canonical.

        Raises:
            PolarError: kind `bad_request`, for malformed JSON or wrong types; the message names the field.
        """
        ...

    def encoder(self, request: ChatRequest, call_id: str, created_at: float) -> StreamEncoder:
        """A stream encoder for one call. All ids it mints derive from `call_id` (see `ids.py`)."""
        ...

    def encode(self, request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> Reply:
        """The whole answer, for a request that did not ask for a stream."""
        ...

    def encode_error(self, error: PolarError, call_id: str = "") -> Reply:
        """An error in the provider's shape, with `retry-after` where the error has one."""
        ...

    def stream_headers(self, call_id: str, request: ChatRequest | None = None) -> dict[str, str]:
        """Headers of a streaming 200 answer; `request` where its stream may have more than one form."""
        ...
