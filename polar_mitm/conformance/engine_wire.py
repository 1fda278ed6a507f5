"""The wire shapes of vLLM 0.32's chat completions, built from an `Answer`."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripts import Answer

CREATED = 1_700_000_000
FINGERPRINT = "vllm-0.32.0-scripted"


@dataclass
class EngineCall:
    """What the engine did for one request; `sent_token_ids` and `wire` are what it has written so far."""

    number: int
    model: str
    request: dict[str, Any]
    prompt_token_ids: list[int]
    completion_token_ids: list[int] = field(default_factory=list)
    sent_token_ids: list[int] = field(default_factory=list)
    wire: bytearray = field(default_factory=bytearray)
    outcome: str = "running"  # then: finished, cancelled, broken, refused
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, outcome: str) -> None:
        self.outcome = outcome
        self.ended.set()


class Token(NamedTuple):
    """One sampled token and what the engine's parsers make of it."""

    token_id: int
    logprob: float
    delta: dict[str, Any]


def logprob_of(token_id: int, position: int) -> float:
    """The deterministic logprob of a token at a position of its completion, in (-1.001, -0.001]."""
    return -((token_id * 31 + position * 7) % 1000 + 1) / 1000


def sample(answer: Answer, call_no: int) -> list[Token]:
    """The answer as sampled tokens, each with the delta that vLLM's parsers would emit with it."""
    tokens: list[Token] = []
    utf8 = codecs.getincrementaldecoder("utf-8")()

    def emit(text: str, wrap: Any = None) -> None:
        for token_id in byte_tokens.encode(text):
            shown = utf8.decode(byte_tokens.token_bytes(token_id)) if wrap else ""
            logprob = logprob_of(token_id, len(tokens)) if answer.logprob is None else answer.logprob
            tokens.append(Token(token_id, logprob, wrap(shown) if wrap and shown else {}))

    if answer.reasoning:
        emit("<think>")
        emit(answer.reasoning, lambda text: {"reasoning": text})
        emit("</think>")
    emit(answer.text, lambda text: {"content": text})
    for index, (name, arguments) in enumerate(answer.tool_calls):
        head, tail = byte_tokens.call_text(name, "\0").split("\0")
        emit(head)
        opening = {
            "id": f"chatcmpl-tool-{call_no:08x}{index:08x}",
            "type": "function",
            "index": index,
            "function": {"name": name},
        }
        tokens[-1] = tokens[-1]._replace(delta={"tool_calls": [opening]})
        emit(arguments, lambda text, i=index: {"tool_calls": [{"index": i, "function": {"arguments": text}}]})
        emit(tail)
    emit("<|im_end|>")
    return tokens


def merge(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """Deltas of consecutive tokens as the one delta of a chunk, or as a whole message's fields."""
    merged: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for key in ("reasoning", "content"):
            if key in delta:
                merged[key] = merged.get(key, "") + delta[key]
        for piece in delta.get("tool_calls", []):
            call = calls.setdefault(piece["index"], {**piece, "function": {}})
            for key, value in piece["function"].items():
                call["function"][key] = call["function"].get(key, "") + value
    if calls:
        merged["tool_calls"] = list(calls.values())
    return merged


def logprobs_json(tokens: list[Token]) -> dict[str, Any]:
    """`logprobs` as in the OpenAI API, with vLLM's empty `top_logprobs`."""
    return {
        "content": [
            {
                "token": byte_tokens.token_bytes(t.token_id).decode(errors="replace"),
                "logprob": t.logprob,
                "bytes": list(byte_tokens.token_bytes(t.token_id)),
                "top_logprobs": [],
            }
            for t in tokens
        ]
    }


def whole(answer: Answer, call: EngineCall, tokens: list[Token], reason: str) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    want_ids = call.request.get("return_token_ids")
    message = {"role": "assistant", "content": None, "reasoning": None, **merge([t.delta for t in tokens])}
    for piece in message.get("tool_calls", []):
        piece.pop("index")
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "logprobs": logprobs_json(tokens)
        if call.request.get("logprobs") and not answer.omit_logprobs
        else None,
        "finish_reason": reason,
        "stop_reason": None,
        "token_ids": call.completion_token_ids if want_ids and not answer.omit_token_ids else None,
    }
    return {
        **_head(call, "chat.completion"),
        "choices": [choice],
        "system_fingerprint": FINGERPRINT,
        "usage": _usage(call),
        "prompt_token_ids": call.prompt_token_ids if want_ids and not answer.omit_prompt_token_ids else None,
    }


def stream(answer: Answer, call: EngineCall, tokens: list[Token], reason: str) -> Iterator[tuple[bytes, int]]:
    """The stream's events, each with the number of sampled tokens that it carries."""
    body = call.request
    head = _head(call, "chat.completion.chunk")
    want_ids = bool(body.get("return_token_ids"))
    first: dict[str, Any] = {**head, "choices": [_choice({"role": "assistant", "content": ""})]}
    if want_ids and not answer.omit_prompt_token_ids:
        first["prompt_token_ids"] = call.prompt_token_ids
    yield event(first), 0
    step = answer.tokens_per_chunk
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        choice = _choice(merge([t.delta for t in part]))
        if body.get("logprobs") and not answer.omit_logprobs:
            choice["logprobs"] = logprobs_json(part)
        if start + step >= len(tokens):
            choice.update(finish_reason=reason, stop_reason=None)
        if want_ids and not answer.omit_token_ids:
            choice["token_ids"] = [t.token_id for t in part]
        yield event({**head, "choices": [choice]}), len(part)
    if (body.get("stream_options") or {}).get("include_usage"):
        tail = {**head, "choices": [], "usage": _usage(call), "system_fingerprint": FINGERPRINT}
        yield event(tail), 0
    yield b"data: [DONE]\n\n", 0


def _head(call: EngineCall, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{call.number:016x}", "object": kind, "created": CREATED, "model": call.model}


def _choice(delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}


def _usage(call: EngineCall) -> dict[str, Any]:
    prompt, sampled = len(call.prompt_token_ids), len(call.completion_token_ids)
    return {"prompt_tokens": prompt, "total_tokens": prompt + sampled, "completion_tokens": sampled}


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
