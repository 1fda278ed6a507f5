"""The official openai SDK, reading the Chat Completions that we emit."""

import json
from typing import Any

from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.ids import minted, sibling
from polar_mitm.dialects.openai_chat import OpenAIChat
from polar_mitm.sse import SSEDecoder
from polar_mitm.types import ChatRequest, Completion, Delta, Message, TextPart, ToolCall, ToolCallDelta
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
    first, *others = (
        _answer(request, index, [d for d in deltas if d.choice == index], fields)
        for index in range(request.n)
    )
    first.others = others
    return first


def _answer(request: ChatRequest, index: int, deltas: list[Delta], fields: dict[str, Any]) -> Completion:
    calls: dict[int, list[ToolCallDelta]] = {}
    for part in (p for d in deltas for p in d.tool_calls):
        calls.setdefault(part.index, []).append(part)
    tool_calls = []
    for number, parts in sorted(calls.items()):
        name = parts[0].name or ""
        tool = request.find_tool(name)
        wire_id = minted("call", sibling(CALL, index), number)
        arguments = "".join(p.arguments for p in parts)
        tool_calls.append(ToolCall(wire_id, name, arguments, tool.kind if tool else "function"))
    text = "".join(d.text for d in deltas)
    reasoning = "".join(d.reasoning for d in deltas) or None
    message = Message("assistant", [TextPart(text)] if text else [], reasoning, tool_calls)
    shown = [token for d in deltas for token in d.shown_logprobs]
    ends = {"finish_reason": "tool_calls" if tool_calls else "stop", "shown_logprobs": shown}
    return Completion(message, **(ends | fields))


def stream_of(request: ChatRequest, deltas: list[Delta], **fields: Any) -> bytes:
    """The whole stream of an answer."""
    encoder = DIALECT.encoder(request, CALL, CREATED)
    middle = b"".join([encoder.start(), *map(encoder.delta, deltas)])
    return middle + encoder.finish(completion_of(request, deltas, **fields))
