"""Canonical answer to Gemini wire: the stream, the whole answer, errors.

Source: ai.google.dev/api/generate-content#GenerateContentResponse, ai.google.dev/gemini-api/docs/thinking
(thoughts and their signatures), cloud.google.com/apis/design/errors.

Harnesses drop the parts that show thoughts and keep signatures, so the seal with the reasoning is the
signature of the first part after the thoughts; it is also the only id of ours that a text carries back. As in
the service's own answers, a function's call comes whole, and the first one has a signature.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
from msgspec import Struct, field

from polar_mitm.dialects.custom_tool import InputUnwrapper, unwrap
from polar_mitm.dialects.gemini_request import ENUM, JSON_ARRAY
from polar_mitm.dialects.ids import minted, seal, sibling
from polar_mitm.dialects.tool_input import as_object
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.types import ChatRequest, Completion, Delta, TokenLogprob, ToolCall

ERRORS: dict[ErrorKind, tuple[int, str]] = {
    "bad_request": (400, "INVALID_ARGUMENT"),
    "not_found": (404, "NOT_FOUND"),
    "too_large": (400, "INVALID_ARGUMENT"),
    "context_overflow": (400, "INVALID_ARGUMENT"),
    "overloaded": (503, "UNAVAILABLE"),
    "upstream": (500, "INTERNAL"),
    "internal": (500, "INTERNAL"),
}
"""HTTP status and `error.status` of each of our errors."""

# The service's own words, by which harnesses recognise what to do about it.
_WORDS: dict[ErrorKind, str] = {
    "too_large": "Request payload size exceeds the limit",
    "context_overflow": "exceeds the maximum number of tokens allowed",
    "overloaded": "The model is overloaded. Please try again later",
    "upstream": "An internal error has occurred",
    "internal": "An internal error has occurred",
}
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"

_encode = msgspec.json.Encoder().encode
_Wire = dict[str, Any]


def error_body(error: PolarError) -> bytes:
    """The body of an error answer, and what a stream says in the place of its next chunk."""
    status, name = ERRORS[error.kind]
    message, words = error.message, _WORDS.get(error.kind, "")
    if words not in message:
        head = f"The input token count {words}" if error.kind == "context_overflow" else words
        message = f"{head}: {message}"
    body: _Wire = {"code": status, "message": message, "status": name}
    if error.retry_after_s is not None:
        body["details"] = [{"@type": _RETRY_INFO, "retryDelay": f"{error.retry_after_s}s"}]
    return _line({"error": body})


def whole(request: ChatRequest, completion: Completion, call_id: str) -> bytes:
    """The body of a whole answer."""
    candidates = []
    for index, done in enumerate((completion, *completion.others)):
        parts: list[_Wire] = []
        message, state = done.message, _Candidate(index, sibling(call_id, index))
        if message.reasoning:
            state.unsealed.append(message.reasoning)
            if request.show_reasoning:
                parts.append({"text": message.reasoning, "thought": True})
        text = unwrap(message.text) if ENUM in request.notes else message.text
        if text:
            parts.append(state.text_part(text))
        parts += state.call_parts(message.tool_calls)
        if not text and not message.tool_calls:
            parts.append(state.text_part(""))
        state.shown, state.all_shown = done.shown_logprobs, done.shown_logprobs
        candidates.append(state.end(parts, done, request))
    return _line({"candidates": candidates, **_usage(completion), **_tail(request, call_id)})


class GeminiStream:
    """The `StreamEncoder` of `streamGenerateContent`: events, or the elements of one JSON array.

    Calls of functions come with the last chunk: the API has no fragments of arguments. Comments, and chunks
    without a part, are never sent: Gemini CLI and the official SDK's chats take such an answer for broken. A
    harness that waits long gets an empty text, which the service sends too, and which nobody keeps.
    """

    def __init__(self, request: ChatRequest, call_id: str) -> None:
        self._request = request
        self._call_id = call_id
        self._candidates: dict[int, _Candidate] = {}
        self._tail = b"," + _encode(_tail(request, call_id))[1:]
        self._array = JSON_ARRAY in request.notes
        self._begun = False  # an element of the array is out

    def start(self) -> bytes:
        return b"[" if self._array else b""

    def delta(self, delta: Delta) -> bytes:
        candidate = self._candidate(delta.choice)
        if candidate.plain and delta.text and not delta.reasoning and not delta.shown_logprobs:
            return self._text(candidate.index, delta.text)  # by far the most frequent
        if delta.shown_logprobs:
            candidate.show(delta.shown_logprobs)
        out = b""
        if delta.reasoning:
            candidate.unsealed.append(delta.reasoning)
            if self._request.show_reasoning:
                out = self._chunk(candidate, {"text": delta.reasoning, "thought": True})
        text = candidate.enum.feed(delta.text) if candidate.enum else delta.text
        if text:  # a chunk of its own: some clients look only at the first part to see thoughts
            out += self._chunk(candidate, candidate.text_part(text))
        return out

    def keepalive(self) -> bytes:
        return b"\n" if self._array else self._text(0, "")

    def finish(self, completion: Completion) -> bytes:
        candidates = []
        for index, done in enumerate((completion, *completion.others)):
            candidate, calls = self._candidate(index), done.message.tool_calls
            rest = candidate.enum.finish() if candidate.enum else ""
            parts = candidate.call_parts(calls) if calls else [candidate.text_part(rest)]
            candidates.append(candidate.end(parts, done, self._request))
        last = {"candidates": candidates, **_usage(completion), **_tail(self._request, self._call_id)}
        return self._framed(_line(last)) + (b"]" if self._array else b"")

    def error(self, error: PolarError) -> bytes:
        """The error as an element of the array. Between events the service writes it bare, and SDKs look
        for just that: in an event's data, they take it for an answer without an end."""
        body = error_body(error)
        return self._framed(body) + b"]" if self._array else body + b"\n"

    def _candidate(self, index: int) -> _Candidate:
        if index not in self._candidates:
            enum = InputUnwrapper() if ENUM in self._request.notes else None
            self._candidates[index] = _Candidate(index, sibling(self._call_id, index), enum)
        return self._candidates[index]

    def _chunk(self, candidate: _Candidate, part: _Wire) -> bytes:
        wire = candidate.wire([part], self._request)
        return self._framed(b'{"candidates":[' + _line(wire) + b"]" + self._tail)

    def _text(self, index: int, text: str) -> bytes:
        end = b'}],"role":"model"},"index":%d}]' % index
        return self._framed(_TEXT + _one_line(_encode(text)) + end + self._tail)

    def _framed(self, chunk: bytes) -> bytes:
        if not self._array:
            return b"data: " + chunk + b"\n\n"
        before, self._begun = (b",\n" if self._begun else b""), True
        return before + chunk


class _Candidate(Struct):
    """One of the answers on its way. `call_id` is its own (see `ids.sibling`)."""

    index: int
    call_id: str
    enum: InputUnwrapper | None = None
    signed: bool = False
    unsealed: list[str] = field(default_factory=list)
    shown: list[TokenLogprob] = field(default_factory=list)  # since the last chunk
    all_shown: list[TokenLogprob] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """A text that comes next has nothing but itself to say."""
        return self.signed and not self.unsealed and not self.shown and self.enum is None

    def show(self, logprobs: list[TokenLogprob]) -> None:
        self.shown += logprobs
        self.all_shown += logprobs

    def text_part(self, text: str) -> _Wire:
        return self._sign({"text": text})

    def call_parts(self, calls: list[ToolCall]) -> list[_Wire]:
        parts: list[_Wire] = []
        for call in calls:
            part = {"functionCall": {"id": call.id, "name": call.name, "args": as_object(call.arguments)}}
            parts.append(part if parts else self._sign(part, always=True))
        return parts

    def _sign(self, part: _Wire, always: bool = False) -> _Wire:
        """The part with a signature, where reasoning came before it or the answer has none yet."""
        if self.unsealed or not self.signed or always:
            blob = seal(self.call_id, "".join(self.unsealed) or None)
            part["thoughtSignature"] = base64.b64encode(blob.encode()).decode()  # the field is bytes
            self.signed = True
            self.unsealed.clear()
        return part

    def wire(self, parts: list[_Wire], request: ChatRequest) -> _Wire:
        out: _Wire = {"content": {"parts": parts, "role": "model"}, "index": self.index}
        if self.shown:
            out["logprobsResult"] = _logprobs(self.shown, bool(request.top_logprobs))
            self.shown = []
        return out

    def end(self, parts: list[_Wire], done: Completion, request: ChatRequest) -> _Wire:
        out = self.wire(parts, request) | {"finishReason": _finish(done)}
        if shown := self.all_shown:
            out["avgLogprobs"] = sum(token.logprob for token in shown) / len(shown)
        return out


def _finish(completion: Completion) -> str:
    if completion.finish_reason == "content_filter":
        return "SAFETY"
    if completion.finish_reason in ("stop", "tool_calls"):
        return "STOP"
    return "MAX_TOKENS"  # cut short: the nearest word the API has


def _logprobs(shown: list[TokenLogprob], top: bool) -> _Wire:
    out: _Wire = {"chosenCandidates": [_logprob(token) for token in shown]}
    if top:
        out["topCandidates"] = [{"candidates": [_logprob(other) for other in token.top]} for token in shown]
    return out


def _logprob(token: TokenLogprob) -> _Wire:
    return {"token": token.token, "logProbability": token.logprob}


def _usage(completion: Completion) -> _Wire:
    """Token counts: the engine's, or those of the ids. The API counts thoughts apart from candidates."""
    usage = completion.usage
    prompt = usage.prompt_tokens or len(completion.prompt_token_ids)
    answers = (completion, *completion.others)
    sampled = usage.completion_tokens or sum(len(done.completion_token_ids) for done in answers)
    out: _Wire = {
        "promptTokenCount": prompt,
        "candidatesTokenCount": max(sampled - usage.reasoning_tokens, 0),
        "totalTokenCount": prompt + sampled,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": prompt}],
    }
    if usage.cached_tokens:
        out["cachedContentTokenCount"] = usage.cached_tokens
    if usage.reasoning_tokens:
        out["thoughtsTokenCount"] = usage.reasoning_tokens
    return {"usageMetadata": out}


def _tail(request: ChatRequest, call_id: str) -> _Wire:
    return {"modelVersion": request.model, "responseId": minted("resp", call_id)}


_TEXT = b'{"candidates":[{"content":{"parts":[{"text":'
# A model's own JSON may have line breaks, and the SDK's line reader also ends lines where Unicode does.
_BREAKS = ((b"\n", b" "), (b"\r", b" "), *((c.encode(), b"\\u%04x" % ord(c)) for c in "\x85\u2028\u2029"))


def _line(value: _Wire) -> bytes:
    return _one_line(_encode(value))


def _one_line(json: bytes) -> bytes:
    """JSON in one line, whoever reads it."""
    for found, instead in _BREAKS:
        if found in json:
            json = json.replace(found, instead)
    return json
