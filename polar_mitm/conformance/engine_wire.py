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
    """What the engine did for one request; `sent_token_ids` and `wire` are what it has written so far.

    The token ids are the first answer's, `other_token_ids` those of further ones.
    """

    number: int
    model: str
    request: dict[str, Any]
    prompt_token_ids: list[int]
    completion_token_ids: list[int] = field(default_factory=list)
    other_token_ids: list[list[int]] = field(default_factory=list)
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


class Choice(NamedTuple):
    """One of the answers to a request, as sampled."""

    tokens: list[Token]
    reason: str


def choices(answer: Answer, request: dict[str, Any], call_no: int, room: float) -> list[Choice]:
    """As many answers as the request asks for, each cut off at `room` tokens."""
    made = []
    for said in [answer, *answer.others, *[answer] * request.get("n", 1)][: request.get("n", 1)]:
        tokens = sample(said, call_no)
        reason = said.finish_reason or ("tool_calls" if said.tool_calls else "stop")
        made.append(Choice(tokens[: int(room)], "length") if len(tokens) > room else Choice(tokens, reason))
    return made


def logprobs_json(tokens: list[Token], top: int = 0) -> dict[str, Any]:
    """`logprobs` as in the OpenAI API; as in vLLM the sampled token is the first of `top_logprobs`."""
    return {"content": [_logprob_json(t, top) for t in tokens]}


def _logprob_json(token: Token, top: int) -> dict[str, Any]:
    rivals = [(byte_tokens.BYTE_OFFSET + (token.token_id + rank) % 128, -rank / 4) for rank in range(1, top)]
    shown = [
        {
            "token": byte_tokens.token_bytes(token_id).decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(byte_tokens.token_bytes(token_id)),
        }
        for token_id, logprob in [(token.token_id, token.logprob), *rivals]
    ]
    return {**shown[0], "top_logprobs": shown[:top]}


def whole(answer: Answer, call: EngineCall, made: list[Choice]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    want_ids = call.request.get("return_token_ids")
    return {
        **_head(call, "chat.completion"),
        "choices": [_whole_choice(answer, call, *each) for each in enumerate(made)],
        "system_fingerprint": FINGERPRINT,
        "usage": _usage(answer, call),
        "prompt_token_ids": call.prompt_token_ids if want_ids and not answer.omit_prompt_token_ids else None,
    }


def _whole_choice(answer: Answer, call: EngineCall, index: int, made: Choice) -> dict[str, Any]:
    tokens, body = made.tokens, call.request
    message = {"role": "assistant", "content": None, "reasoning": None, **merge([t.delta for t in tokens])}
    for piece in message.get("tool_calls", []):
        piece.pop("index")
    want_ids = body.get("return_token_ids") and not answer.omit_token_ids
    return {
        "index": index,
        "message": message,
        "logprobs": _asked_logprobs(answer, body, tokens),
        "finish_reason": made.reason,
        "stop_reason": None,
        "token_ids": [t.token_id for t in tokens] if want_ids else None,
    }


def _asked_logprobs(answer: Answer, body: dict[str, Any], tokens: list[Token]) -> dict[str, Any] | None:
    wanted = body.get("logprobs") and not answer.omit_logprobs
    return logprobs_json(tokens, body.get("top_logprobs") or 0) if wanted else None


def stream(answer: Answer, call: EngineCall, made: list[Choice]) -> Iterator[tuple[bytes, int]]:
    """The stream's events, each with the number of the first answer's tokens that it carries."""
    body = call.request
    head = _head(call, "chat.completion.chunk")
    want_ids = bool(body.get("return_token_ids"))
    for index in range(len(made)):
        first: dict[str, Any] = {**head, "choices": [_choice(index, {"role": "assistant", "content": ""})]}
        if want_ids and not answer.omit_prompt_token_ids:
            first["prompt_token_ids"] = call.prompt_token_ids
        yield event(first), 0
    step = answer.tokens_per_chunk
    for start in range(0, max(len(each.tokens) for each in made), step):
        for index, (tokens, reason) in enumerate(made):
            part = tokens[start : start + step]
            if not part:
                continue
            choice = _choice(index, merge([t.delta for t in part]))
            choice["logprobs"] = _asked_logprobs(answer, body, part)
            if start + step >= len(tokens):
                choice.update(finish_reason=reason, stop_reason=None)
            if want_ids and not answer.omit_token_ids:
                choice["token_ids"] = [t.token_id for t in part]
            yield event({**head, "choices": [choice]}), 0 if index else len(part)
    if (body.get("stream_options") or {}).get("include_usage"):
        tail = {**head, "choices": [], "usage": _usage(answer, call), "system_fingerprint": FINGERPRINT}
        yield event(tail), 0
    yield b"data: [DONE]\n\n", 0


def _head(call: EngineCall, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{call.number:016x}", "object": kind, "created": CREATED, "model": call.model}


def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _usage(answer: Answer, call: EngineCall) -> dict[str, Any]:
    prompt = len(call.prompt_token_ids) if answer.num_prompt_tokens is None else answer.num_prompt_tokens
    sampled = sum(map(len, [call.completion_token_ids, *call.other_token_ids]))
    return {"prompt_tokens": prompt, "total_tokens": prompt + sampled, "completion_tokens": sampled}


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
