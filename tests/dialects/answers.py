"""Answers as engines give them: in pieces, and what the exchange puts together from those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from polar_mitm.dialects.ids import sibling
from polar_mitm.gathered import Gathered
from polar_mitm.types import ChatRequest, Completion, Delta, ModelCall, ToolCallDelta


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def split(completion: Completion, size: int, choice: int = 0) -> list[Delta]:
    """The answer as an engine might stream it: `size` characters at a time, with empty chunks between."""
    message = completion.message
    deltas = [Delta(reasoning=piece) for piece in pieces(message.reasoning or "", size)]
    deltas += [Delta(text=piece) for piece in pieces(message.text, size)]
    for index, call in enumerate(message.tool_calls):
        deltas.append(Delta(tool_calls=[ToolCallDelta(index, call.name)]))
        deltas += [Delta(tool_calls=[ToolCallDelta(index, None, p)]) for p in pieces(call.arguments, size)]
    deltas = [d for delta in deltas for d in (delta, Delta(token_ids=[1], logprobs=[-0.1]))]
    for delta in deltas:
        delta.choice = choice
    return deltas


def gather(call_id: str, request: ChatRequest, deltas: Sequence[Delta], **fields: Any) -> Completion:
    """What the exchange makes of the deltas of a request's answers, with these fields in each."""
    answers = []
    for index in range(request.n):
        call = ModelCall(sibling(call_id, index), "r", 0, "", "", "ok")
        answer = Gathered(call)
        for delta in deltas:
            if delta.choice == index:
                answer.add(delta, lambda: 0.0, None)
        answer.settle(request, "call")
        finish = "tool_calls" if answer.completion.message.tool_calls else "stop"
        answers.append(replace(answer.completion, **({"finish_reason": finish} | fields)))
    answers[0].others = answers[1:]
    return answers[0]
