"""Answers as they come: deltas in, what was sampled and said out. A request for several has one of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from polar_mitm.dialects.ids import minted, sibling
from polar_mitm.types import (
    ANSWER_OF,
    ChatRequest,
    Completion,
    Delta,
    Message,
    ModelCall,
    TextPart,
    ToolCall,
    Usage,
    Wire,
)


class Gathered:
    """What has come of one answer. `call` is its record, in which it notes the first and the last token."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call
        self.completion = Completion(Message("assistant"))
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[str, list[str]]] = {}

    def add(self, delta: Delta, clock: Callable[[], float], policy_version: str | None) -> None:
        """A delta of this answer, sampled under `policy_version`."""
        done, call = self.completion, self.call
        if delta.token_ids:
            if call.first_token_at is None:
                call.first_token_at = clock()
                call.policy_version = policy_version
            elif policy_version != call.policy_version:
                call.policy_version_last = policy_version
            done.completion_token_ids += delta.token_ids
        if delta.logprobs:
            done.behaviour_logprobs += delta.logprobs
        if delta.shown_logprobs:
            done.shown_logprobs += delta.shown_logprobs
        if delta.text:
            self._text.append(delta.text)
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        for part in delta.tool_calls:
            self._calls.setdefault(part.index, (part.name or "", []))[1].append(part.arguments)
        if delta.finish_reason is not None:
            done.finish_reason = delta.finish_reason
            done.stop_reason = delta.stop_reason

    @property
    def whole(self) -> bool:
        """It came to its end, and the engine did not break it off."""
        return self.completion.finish_reason not in (None, "abort")

    def settle(self, request: ChatRequest | None, tool_id_prefix: str) -> None:
        """Put together the message, with ids that we mint for its tool calls."""
        calls = []
        for index, (name, fragments) in sorted(self._calls.items()):
            tool = request.find_tool(name) if request else None
            wire_id = minted(tool_id_prefix, self.call.call_id, index)
            kind, namespace = (tool.kind, tool.namespace) if tool else ("function", None)
            calls.append(ToolCall(wire_id, tool.name if tool else name, "".join(fragments), kind, namespace))
        text = "".join(self._text)
        self.completion.message = Message(
            "assistant",
            [TextPart(text)] if text else [],
            reasoning="".join(self._reasoning) or None,
            tool_calls=calls,
        )


class Choices:
    """The answers to one request, by `Delta.choice`, and the call's record of each: `call` is the first's."""

    def __init__(self, call: ModelCall) -> None:
        self.each = [Gathered(call)]
        self._usage = Usage()

    def expect(self, num: int) -> None:
        """So many are asked for, and each begins with what the call's record has so far."""
        call = self.each[0].call
        self.each += [Gathered(replace(call, call_id=sibling(call.call_id, k))) for k in range(1, num)]

    def add(self, delta: Delta, clock: Callable[[], float], policy_version: str | None) -> None:
        """A delta of one of them."""
        if delta.prompt_token_ids is not None:
            for answer in self.each:
                answer.completion.prompt_token_ids = delta.prompt_token_ids
        if delta.usage is not None:
            self._usage = delta.usage
        self.each[delta.choice].add(delta, clock, policy_version)

    @property
    def whole(self) -> bool:
        """All of them came to their end."""
        return all(answer.whole for answer in self.each)

    def settle(self, request: ChatRequest | None, tool_id_prefix: str) -> None:
        """Put together what they say; the further ones are the first one's `others`."""
        for answer, usage in zip(self.each, self._shares(), strict=True):
            answer.settle(request, tool_id_prefix)
            answer.completion.usage = usage
        first, *others = (answer.completion for answer in self.each)
        first.others = others

    def records(self) -> list[ModelCall]:
        """Each one's call as a row: the first has the wire, the others name it."""
        first = self.each[0].call
        for answer, usage in zip(self.each, self._shares(), strict=True):
            done = answer.completion
            if answer.call is not first:
                answer.call = further(first, answer.call)
            answer.call.prompt_token_ids = done.prompt_token_ids
            answer.call.completion_token_ids = done.completion_token_ids
            answer.call.behaviour_logprobs = done.behaviour_logprobs
            answer.call.usage = usage
            answer.call.finish_reason = done.finish_reason
            if first.status in ("ok", "cancelled"):
                answer.call.answer = done.message
        return [answer.call for answer in self.each]

    def _shares(self) -> list[Usage]:
        return shares(self._usage, [len(answer.completion.completion_token_ids) for answer in self.each])


def shares(total: Usage, counts: Sequence[int]) -> list[Usage]:
    """What of an engine's count for a request belongs to each of its answers, of `counts` sampled ids.

    The engine counts the tokens of all answers together. Where they are more or fewer than came, the
    difference is with each of them, so that none of them passes for whole. A lone answer's count is the
    engine's own. How many of several answers' tokens were reasoning is not known.
    """
    if len(counts) == 1 or not total.completion_tokens:
        return [total for _ in counts]
    amiss = abs(total.completion_tokens - sum(counts))
    return [replace(total, completion_tokens=num + amiss, reasoning_tokens=0) for num in counts]


_OWN = (
    "call_id", "first_token_at", "policy_version", "policy_version_last", "prompt_token_ids", "usage",
    "completion_token_ids", "behaviour_logprobs", "finish_reason", "answer", "replayed_from",
)  # fmt: skip


def further(first: ModelCall, own: ModelCall) -> ModelCall:
    """The record of a further answer to the request of `first`: what is not its `own` is that call's.

    The wire is with `first` only, which a note names.
    """
    notes = [*first.notes, f"{ANSWER_OF}{first.call_id}"]
    return replace(first, **{name: getattr(own, name) for name in _OWN}, notes=notes, wire=Wire())
