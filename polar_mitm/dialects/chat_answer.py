"""Canonical answer to Chat Completions wire: the chunk stream, the whole answer, errors.

Source: platform.openai.com/docs/api-reference/chat (object, streaming), and the official SDK's types.

Reasoning is given twice, as `reasoning_content` (DeepSeek, DashScope) and as `reasoning` (OpenRouter, vLLM):
clients read the one that they know, and those that know both take the first that is not empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from polar_mitm import sse
from polar_mitm.dialects.chat_tools import FUNCTIONS
from polar_mitm.dialects.custom_tool import InputUnwrapper, unwrap
from polar_mitm.dialects.ids import minted, sibling
from polar_mitm.dialects.responses_answer import ERRORS
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, Completion, Delta, TokenLogprob, ToolCall, ToolCallDelta

BROKEN_OFF = "the engine broke off the answer"

_encode = msgspec.json.Encoder().encode
_Wire = dict[str, Any]

# --- errors ---------------------------------------------------------------------------------------------

# The service's own words, by which harnesses recognise an overflow, and compact.
_OVERFLOW = "This model's maximum context length"
_ADVICE = "Please reduce the length of the messages."


def error_body(error: PolarError) -> bytes:
    """The body of an error answer, and the data of the event that breaks off a stream."""
    _, kind, code = ERRORS[error.kind]
    message, param = error.message, None
    if error.kind == "context_overflow":
        param = "messages"
        if not message.startswith(_OVERFLOW):
            message = f"{_OVERFLOW} is exceeded ({message})."
        if "reduce the length" not in message:
            message = f"{message} {_ADVICE}"
    return _encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


# --- the whole answer -----------------------------------------------------------------------------------


def broken(completion: Completion) -> bool:
    """Whether one of the answers has no end."""
    return any(c.finish_reason in ("abort", None) for c in (completion, *completion.others))


def whole(request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> bytes:
    """The body of a whole answer."""
    head = _head(request, call_id, created_at, "chat.completion")
    answers = enumerate((completion, *completion.others))
    choices = [_choice(request, index, answer) for index, answer in answers]
    return _encode(head | {"choices": choices, "usage": usage_object(completion)})


def _head(request: ChatRequest, call_id: str, created_at: float, kind: str) -> _Wire:
    return {
        "id": minted("chatcmpl", call_id),
        "object": kind,
        "created": int(created_at),
        "model": request.model,
    }


def _choice(request: ChatRequest, index: int, completion: Completion) -> _Wire:
    answer = completion.message
    calls = answer.tool_calls
    message: _Wire = {
        "role": "assistant",
        "content": answer.text or (None if calls else ""),
        "refusal": None,
        "annotations": [],
    }
    if answer.reasoning and request.show_reasoning:
        message |= _thought(answer.reasoning)
    if calls and FUNCTIONS in request.notes:
        message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        message["tool_calls"] = [_called(call) for call in calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(completion.shown_logprobs) if request.top_logprobs is not None else None,
        "finish_reason": _reason(request, completion),
    }


def _called(call: ToolCall) -> _Wire:
    if call.kind == "custom":
        custom = {"name": call.name, "input": unwrap(call.arguments)}
        return {"id": call.id, "type": "custom", "custom": custom}
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _thought(text: str) -> _Wire:
    return {"reasoning_content": text, "reasoning": text}


def _reason(request: ChatRequest, completion: Completion) -> str:
    if completion.finish_reason in ("length", "content_filter"):
        return completion.finish_reason
    if not completion.message.tool_calls:
        return "stop"
    # Also after "stop": engines say so where a tool was forced.
    return "function_call" if FUNCTIONS in request.notes else "tool_calls"


def _logprobs(tokens: Iterable[TokenLogprob]) -> _Wire:
    return {
        "content": [{**_token(t), "top_logprobs": [_token(top) for top in t.top]} for t in tokens],
        "refusal": None,
    }


def _token(token: TokenLogprob) -> _Wire:
    # JSON has no infinity; the API's word for "next to impossible" is -9999.
    logprob = token.logprob if token.logprob > -9999.0 else -9999.0
    return {"token": token.token, "logprob": logprob, "bytes": token.bytes}


def usage_object(completion: Completion) -> _Wire:
    """Token counts of all answers to one prompt: the engine's, or those of the ids where it gave none."""
    usage = completion.usage
    prompt = usage.prompt_tokens or len(completion.prompt_token_ids)
    every = (completion, *completion.others)
    sampled = sum(c.usage.completion_tokens or len(c.completion_token_ids) for c in every)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(c.usage.reasoning_tokens for c in every)},
    }


# --- the stream -----------------------------------------------------------------------------------------


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
        head = _encode(_head(request, call_id, created_at, "chat.completion.chunk"))
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
            pieces.append(_thought(delta.reasoning))
        if text:
            pieces.append({"content": text})
        for call in delta.tool_calls:
            pieces += self._call(answer, call)
        if not pieces and shown:  # tokens that a parser holds back
            pieces.append({})
        out = [self._chunk(answer, piece, shown if at == 0 else None) for at, piece in enumerate(pieces)]
        return b"".join(out)

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
            end = b'{},"logprobs":null,"finish_reason":%b' % _encode(_reason(self._request, done))
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
        logprobs = _encode(_logprobs(shown))
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
