"""vLLM's event stream of a chat completion: bytes in, canonical deltas out.

Source: vLLM's OpenAI-compatible server (docs.vllm.ai, "Chat API"), fields `prompt_token_ids`, `token_ids`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct, field

from polar_mitm.errors import UNREADABLE, PolarError
from polar_mitm.sse import EventTooLarge, SSEDecoder
from polar_mitm.token_ids import TokenIds
from polar_mitm.types import Delta, FinishReason, TokenLogprob, ToolCallDelta, Usage
from polar_mitm.upstream.refusals import error_text


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(Struct):
    index: int = 0
    function: _Function = field(default_factory=_Function)


class _ChunkDelta(Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Logprob(Struct):
    logprob: float


class _ShownLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[_ShownLogprob] = field(default_factory=list)


P = TypeVar("P", _Logprob, _ShownLogprob)


class _Logprobs(Struct, Generic[P]):
    content: list[P] | None = None


class _Choice(Struct, Generic[P]):
    index: int = 0
    delta: _ChunkDelta = field(default_factory=_ChunkDelta)
    logprobs: _Logprobs[P] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _CompletionDetails(Struct):
    reasoning_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(Struct, Generic[P]):
    choices: list[_Choice[P]] = field(default_factory=list)
    prompt_token_ids: msgspec.Raw = msgspec.Raw(b"null")
    usage: _Usage | None = None
    error: Any = None
    system_fingerprint: str | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk[_Logprob]).decode
_decode_shown = msgspec.json.Decoder(_Chunk[_ShownLogprob]).decode
_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
    "abort": "abort",
}


class ChatStream:
    """The engine's event stream, bytes in, canonical deltas out. `done` once it has ended properly.

    `n` is how many answers were asked for; with `top_logprobs`, as in `ChatRequest`, deltas with text bring
    `shown_logprobs`.
    """

    def __init__(self, n: int = 1, top_logprobs: int | None = None) -> None:
        self._sse = SSEDecoder()
        self._n = n
        self._top = top_logprobs
        self._held: dict[int, list[TokenLogprob]] = {}
        self.done = False
        self.fingerprint: str | None = None

    def feed(self, data: bytes) -> Iterable[Delta]:
        """Deltas of a chunk of bytes, one for each choice of each engine chunk.

        Raises:
            PolarError: kind `upstream`, for an error event or bytes that are no such stream.
        """
        if self.done:
            return
        too_large: EventTooLarge | None = None
        try:
            events = self._sse.feed(data)
        except EventTooLarge as error:
            events, too_large = error.events, error
        for event in events:
            if event.data == b"[DONE]":
                self.done = True
                return
            try:
                chunk = _decode_chunk(event.data) if self._top is None else _decode_shown(event.data)
            except UNREADABLE as error:
                raise PolarError("upstream", f"engine stream: {error}") from error
            if chunk.error is not None:
                raise PolarError("upstream", f"engine error: {error_text(chunk.error)}")
            self.fingerprint = chunk.system_fingerprint or self.fingerprint
            try:
                ids = _prompt_ids(chunk.prompt_token_ids)
            except ValueError as error:
                raise PolarError("upstream", f"engine stream: {error}") from error
            if not chunk.choices and (ids is not None or chunk.usage):
                yield Delta(prompt_token_ids=ids, usage=_usage(chunk.usage))
            for choice in chunk.choices:
                if not 0 <= choice.index < self._n:
                    raise PolarError("upstream", f"engine stream: choice {choice.index} of {self._n}")
                delta = _delta(choice)
                if choice is chunk.choices[0]:
                    delta.prompt_token_ids, delta.usage = ids, _usage(chunk.usage)
                if self._top is not None:
                    delta.shown_logprobs = self._show(delta, _shown(choice, self._top))
                yield delta
        if too_large is not None:
            raise PolarError("upstream", f"engine stream: {too_large}") from too_large

    def _show(self, delta: Delta, tokens: list[TokenLogprob]) -> list[TokenLogprob]:
        """Tokens of the text and of the marks around it, not of reasoning or tool calls, as APIs have it."""
        held = self._held.pop(delta.choice, []) + tokens
        if delta.text:
            return held
        if not delta.reasoning and not delta.tool_calls:
            self._held[delta.choice] = held  # which of them it is, a parser does not know yet
        return []


def _prompt_ids(raw: msgspec.Raw) -> TokenIds | None:
    text = bytes(raw)
    return None if text == b"null" else TokenIds.from_json(text)


def _delta(choice: _Choice[Any]) -> Delta:
    delta = choice.delta
    out = Delta(
        text=delta.content or "",
        reasoning=delta.reasoning or delta.reasoning_content or "",
        choice=choice.index,
    )
    if delta.tool_calls:
        out.tool_calls = [
            ToolCallDelta(c.index, c.function.name, c.function.arguments or "") for c in delta.tool_calls
        ]
    if choice.token_ids:
        out.token_ids = choice.token_ids
    if choice.logprobs is not None and choice.logprobs.content:
        out.logprobs = [p.logprob for p in choice.logprobs.content]
    if choice.finish_reason is not None:
        out.finish_reason = _FINISH.get(choice.finish_reason, "stop")
        out.stop_reason = choice.stop_reason
    return out


def _shown(choice: _Choice[Any], top: int) -> list[TokenLogprob]:
    content = choice.logprobs.content if choice.logprobs is not None else None
    return [
        TokenLogprob(
            p.token,
            p.logprob,
            p.bytes,
            [
                TokenLogprob(t.token, t.logprob, t.bytes)
                for t in sorted(p.top_logprobs, key=lambda t: -t.logprob)[:top]
            ],
        )
        for p in content or ()
    ]


def _usage(usage: _Usage | None) -> Usage | None:
    if usage is None:
        return None
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens or 0,
        cached_tokens=(prompt.cached_tokens if prompt else None) or 0,
        reasoning_tokens=(completion.reasoning_tokens if completion else None) or 0,
    )
