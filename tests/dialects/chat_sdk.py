"""The official openai SDK, reading the Chat Completions that we emit."""

import json
from typing import Any

from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.openai_chat import OpenAIChat
from polar_mitm.sse import SSEDecoder
from polar_mitm.types import ChatRequest, Completion, Delta
from tests.dialects.answers import gather
from tests.dialects.responses_sdk import CALL, CREATED, client

DIALECT = OpenAIChat()
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chunks(wire: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that ends well, as JSON."""
    *events, last = SSEDecoder().feed(wire)
    assert last.data == b"[DONE]" and not any(event.event for event in events)
    return [json.loads(event.data) for event in events]


def streamed(wire: bytes) -> list[ChatCompletionChunk]:
    """What the SDK's plain stream gives."""
    sdk = client(Reply(200, wire, DIALECT.stream_headers(CALL)))
    return list(sdk.chat.completions.create(**ASK, stream=True))


def snapshot(wire: bytes) -> ChatCompletion:
    """What the SDK's accumulator has after the last chunk, whatever its finish reason."""
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in streamed(wire):
        state.handle_chunk(chunk)
    return state.current_completion_snapshot


def read(request: ChatRequest, completion: Completion) -> ChatCompletion:
    """The whole answer as the SDK reads it."""
    return client(DIALECT.encode(request, completion, CALL, CREATED)).chat.completions.create(**ASK)


def completion_of(request: ChatRequest, deltas: list[Delta], **fields: Any) -> Completion:
    """What the exchange makes of these deltas: one answer for each choice."""
    return gather(CALL, request, deltas, **fields)


def stream_of(request: ChatRequest, deltas: list[Delta], **fields: Any) -> bytes:
    """The whole stream of an answer."""
    encoder = DIALECT.encoder(request, CALL, CREATED)
    middle = b"".join([encoder.start(), *map(encoder.delta, deltas)])
    return middle + encoder.finish(completion_of(request, deltas, **fields))
