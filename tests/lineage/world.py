"""A rollout in miniature: answers of an engine, echoes as harnesses send them, calls as recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from polar_mitm.dialects.ids import minted, new_id
from polar_mitm.lineage import Found, Lineage
from polar_mitm.types import ChatRequest, Message, ModelCall, TextPart, Tool, ToolCall

TOOLS = [Tool("bash", "Runs a command.", {"type": "object", "properties": {"command": {"type": "string"}}})]
COMMAND = '{"command": "ls", "timeout": 5}'


def text(role: Any, said: str) -> Message:
    return Message(role, [TextPart(said)] if said else [])


def answer(
    said: str = "", *, reasoning: str | None = None, tools: Sequence[str] = (), call_id: str = ""
) -> Message:
    """What the model said in call `call_id`; `tools` are the arguments of its calls of `bash`."""
    calls = [ToolCall(minted("toolu", call_id, n), "bash", arguments) for n, arguments in enumerate(tools)]
    return Message("assistant", [TextPart(said)] if said else [], reasoning, calls)


def echo(said: Message, **changes: Any) -> Message:
    """An answer as it comes back: with the ids of its tool calls, and fields replaced by `changes`."""
    changed = msgspec.structs.replace(said, **changes)
    changed.minted_ids = [call.id for call in changed.tool_calls]
    return copy(changed)


def copy(record: Any) -> Any:
    """An equal record that shares nothing, as decoding another request would make it."""
    return msgspec.json.decode(msgspec.json.encode(record), type=type(record))


def results(said: Message) -> list[Message]:
    return [
        Message("tool", [TextPart("ok")], tool_call_id=call.id, minted_ids=[call.id])
        for call in said.tool_calls
    ]


def ask(*messages: Message, tools: Sequence[Tool] = TOOLS) -> ChatRequest:
    return copy(ChatRequest("m", list(messages), list(tools)))


HEAD = (text("system", "You are an agent."), text("user", "Do it."))


class World:
    """A `Lineage` and the calls made so far; each has ids of its own, prompts as if rendered anew."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.lineage = Lineage() if max_bytes is None else Lineage(max_bytes)
        self.calls: list[tuple[ModelCall, ChatRequest]] = []

    def call(
        self,
        request: ChatRequest,
        said: str = "",
        *,
        reasoning: str | None = None,
        tools: Sequence[str] = (),
        **fields: Any,
    ) -> ModelCall:
        """Ask, answer and remember; the parent recorded is the one that is found."""
        number = len(self.calls)
        found = self.lineage.find(request)
        call = ModelCall(new_id(), "r1", number, "anthropic", "POST /v1/messages", "ok", finish_reason="stop")
        call.delivered = True
        call.prompt_token_ids = [1, 2, 3, number]
        call.completion_token_ids = [7, number]
        call.started_at, call.ended_at = float(number), number + 0.5
        if found.parent:
            call.parent_call_id, call.continuation = found.parent.call_id, "exact"
        call.fallback = found.fallback
        call.edits = [*found.edits]
        call.answer = answer(said, reasoning=reasoning, tools=tools, call_id=call.call_id)
        for name, value in fields.items():
            setattr(call, name, value)
        self.lineage.add(call, request)
        self.calls.append((call, request))
        return call

    def find(self, *messages: Message, tools: Sequence[Tool] = TOOLS) -> Found:
        return self.lineage.find(ask(*messages, tools=tools))


def parent(found: Found) -> str | None:
    return found.parent.call_id if found.parent else None


def said(call: ModelCall) -> Message:
    assert call.answer is not None
    return call.answer


def compact(arguments: str) -> str:
    return json.dumps(json.loads(arguments), separators=(",", ":"))
