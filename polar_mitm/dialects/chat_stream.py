"""Canonical answer to Chat Completions chunks.

Source: platform.openai.com/docs/api-reference/chat-streaming, and the official SDK's accumulator.

The finish reasons come all at the end, with the rest of each tool call: clients begin to work when they see
them, which must not be before the answer is recorded.
"""

from __future__ import annotations

from typing import Any

import msgspec

from polar_mitm import sse
from polar_mitm.dialects.chat_answer import (
    broken,
    error_body,
    finish_word,
    head_object,
    logprobs_object,
    reasoning_object,
    usage_object,
)
from polar_mitm.dialects.chat_request import DETAILS
from polar_mitm.dialects.chat_tools import FUNCTIONS
from polar_mitm.dialects.custom_tool import InputUnwrapper
from polar_mitm.dialects.ids import minted, sibling
from polar_mitm.dialects.responses_answer import BROKEN_OFF
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, Completion, Delta, TokenLogprob, ToolCallDelta

_encode = msgspec.json.Encoder().encode
_Wire = dict[str, Any]


class _Call:
    """A tool call being made. Its `}` at the end are held back until it is known that more follows.

    Clients such as the AI SDK run a call as soon as its arguments are whole JSON, which must not be before
    the call is recorded.
    """

    def __init__(self, position: int, wire_id: str, name: str, custom: bool) -> None:
        self.position = position
        self._id: str | None = wire_id
        self._name = name
        self._unwrapper = InputUnwrapper() if custom else None
        self._held = ""

    def feed(self, fragment: str) -> str:
        """What may be given out for the next fragment of arguments."""
        if self._unwrapper is not None:
            return self._unwrapper.feed(fragment)
        text = self._held + fragment
        settled = text.rstrip("} \t\r\n")
        self._held = text[len(settled) :]
        return settled

    def finish(self) -> str:
        """The rest."""
        return self._held if self._unwrapper is None else self._unwrapper.finish()

    def function(self, text: str) -> _Wire:
        """The call's next piece in the first form of tools."""
        named = {} if self._id is None else {"name": self._name}
        self._id = None
        return {"function_call": {**named, "arguments": text}}

    def wire(self, text: str) -> _Wire:
        """The call's next piece."""
        kind, field = ("function", "arguments") if self._unwrapper is None else ("custom", "input")
        head: _Wire = {"index": self.position}
        named: _Wire = {}
        if self._id is not None:
            head |= {"id": self._id, "type": kind}
            named["name"] = self._name
            self._id = None
        return {"tool_calls": [{**head, kind: {**named, field: text}}]}


class _Answer:
    """One of the request's answers: its calls by the engine's number, and what stands before its deltas."""

    def __init__(self, call_id: str, before: bytes) -> None:
        self.call_id = call_id
        self.before = before
        self.calls: dict[int, _Call] = {}


class ChatStream:
    """The `StreamEncoder` of Chat Completions."""

    def __init__(self, request: ChatRequest, call_id: str, created_at: float) -> None:
        self._request = request
        self._functions = FUNCTIONS in request.notes
        self._details = DETAILS in request.notes
        head = _encode(head_object(request, call_id, created_at, "chat.completion.chunk"))
        self._head = b"data: " + head[:-1]
        self._answers = [
            _Answer(sibling(call_id, index), b'%b,"choices":[{"index":%d,"delta":' % (self._head, index))
            for index in range(request.n)
        ]
        self._tail = b'}],"usage":null}\n\n' if request.stream_usage else b"}]}\n\n"
        self._after = b',"logprobs":null,"finish_reason":null' + self._tail
        self._after_text = b"}" + self._after

    def start(self) -> bytes:
        begun = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(answer, begun) for answer in self._answers)

    def delta(self, delta: Delta) -> bytes:
        answer = self._answers[delta.choice]
        text, shown = delta.text, delta.shown_logprobs
        if text and not (shown or delta.reasoning or delta.tool_calls):
            return b'%b{"content":%b%b' % (answer.before, _encode(text), self._after_text)
        pieces: list[_Wire] = []
        if delta.reasoning and self._request.show_reasoning:
            pieces.append(reasoning_object(delta.reasoning, self._details))
        if text:
            pieces.append({"content": text})
        for call in delta.tool_calls:
            pieces += self._call(answer, call)
        return b"".join(self._chunk(answer, piece, shown if "content" in piece else None) for piece in pieces)

    def keepalive(self) -> bytes:
        return b": keepalive\n\n"

    def finish(self, completion: Completion) -> bytes:
        if broken(completion):
            return self.error(PolarError("upstream", BROKEN_OFF))
        out: list[bytes] = []
        for answer, done in zip(self._answers, (completion, *completion.others), strict=True):
            for call in answer.calls.values():
                if rest := call.finish():
                    out.append(self._chunk(answer, self._piece(call, rest)))
            end = b'{},"logprobs":null,"finish_reason":%b' % _encode(finish_word(self._request, done))
            out.append(answer.before + end + self._tail)
        if self._request.stream_usage:
            usage = _encode(usage_object(completion))
            out.append(b'%b,"choices":[],"usage":%b}\n\n' % (self._head, usage))
        out.append(sse.encode(b"[DONE]"))
        return b"".join(out)

    def error(self, error: PolarError) -> bytes:
        """No `[DONE]` after it: to a client that does not look for errors, the stream is cut."""
        return sse.encode(error_body(error))

    def _chunk(self, answer: _Answer, delta: _Wire, shown: list[TokenLogprob] | None = None) -> bytes:
        data = _encode(delta)
        if not shown:
            return answer.before + data + self._after
        logprobs = _encode(logprobs_object(shown))
        return b'%b%b,"logprobs":%b,"finish_reason":null%b' % (answer.before, data, logprobs, self._tail)

    def _call(self, answer: _Answer, fragment: ToolCallDelta) -> list[_Wire]:
        """A call's next piece. Each makes a chunk: some clients lose the second of a call's in one chunk."""
        call = answer.calls.get(fragment.index)
        begun = call is None
        if call is None:
            if self._functions and answer.calls:
                return []  # the first form of tools has room for one call
            wire_id = minted("call", answer.call_id, fragment.index)
            tool = self._request.find_tool(fragment.name or "")
            name = tool.name if tool else fragment.name or ""
            custom = tool is not None and tool.kind == "custom"
            call = answer.calls[fragment.index] = _Call(len(answer.calls), wire_id, name, custom)
        text = call.feed(fragment.arguments)
        return [self._piece(call, text)] if text or begun else []

    def _piece(self, call: _Call, text: str) -> _Wire:
        return call.function(text) if self._functions else call.wire(text)
