"""What a harness is told of the engine, in every dialect: tokens, overflows, room; and what is recorded."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from polar_mitm.asking import CLAMPED, UpstreamRequest
from polar_mitm.config import Settings
from polar_mitm.conformance.scripts import Answer
from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.exchange import Exchange
from polar_mitm.types import ModelCall, Sampling, Usage, Wire
from polar_mitm.upstream.engine import EngineInfo
from tests.support.engine_bytes import PROMPT_IDS, events, sampled

WINDOW = 4096
ENGINE = EngineInfo("http://engine", "tiny", max_model_len=WINDOW)
ANSWER = Answer(text="Hello there.")
NUM_PROMPT, NUM_SAMPLED = len(PROMPT_IDS), len(sampled(ANSWER))
MODEL = {
    "anthropic": ("claude-opus-5-5", 1_000_000),
    "openai_responses": ("gpt-6.1-sol", 272_000),
    "openai_chat": ("qwen3.7-max", 1_000_000),
    "gemini": ("gemini-3.8-flash", 1_048_576),
}
PATH = {
    "anthropic": "/v1/messages",
    "openai_responses": "/v1/responses",
    "openai_chat": "/v1/chat/completions",
    "gemini": "/v1beta/models/{model}:{verb}",
}
each = pytest.mark.parametrize("name", MODEL)
streaming = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


def asked(
    name: str,
    *,
    stream: bool = True,
    max_tokens: int | None = None,
    settings: Settings | None = None,
    engine: EngineInfo = ENGINE,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> tuple[Exchange, UpstreamRequest]:
    """A call that has been begun, and what the engine is asked."""
    model, _ = MODEL[name]
    config: dict[str, Any] = {}
    if name == "gemini":
        config = {"maxOutputTokens": max_tokens} if max_tokens else {}
        body: dict[str, Any] = {"contents": [{"role": "user", "parts": [{"text": "go"}]}]}
        body["generationConfig"] = config | fields.pop("generationConfig", {})
    elif name == "openai_responses":
        body = {"model": model, "input": "go", "stream": stream, "max_output_tokens": max_tokens}
    else:
        body = {"model": model, "messages": [{"role": "user", "content": "go"}], "stream": stream}
        body |= {"max_tokens": max_tokens} if max_tokens else {}
        body |= {"stream_options": {"include_usage": True}} if stream and name == "openai_chat" else {}
    verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
    path = PATH[name].format(model=model, verb=verb)
    exchange = Exchange(
        DIALECTS[name], engine, settings or Settings(), rollout_id="r1", seq=0, clock=lambda: 1000.0
    )
    wire = Wire("POST", "host", path, [], json.dumps(body | fields).encode())
    step = exchange.start(wire, headers or {})
    assert isinstance(step, UpstreamRequest), step
    return exchange, step


def answered(exchange: Exchange, *, stream: bool, answer: Answer = ANSWER) -> tuple[bytes, ModelCall]:
    """The whole answer, and the record."""
    out = b""
    if stream:
        exchange.open()
    for chunk in events(answer):
        out += exchange.feed(chunk)
    end = exchange.finish()
    out += end.body if isinstance(end, Reply) else end
    return out, exchange.records(delivered=True)[0]


COUNTS = {
    "anthropic": ("input_tokens", "output_tokens"),
    "openai_responses": ("input_tokens", "output_tokens"),
    "openai_chat": ("prompt_tokens", "completion_tokens"),
    "gemini": ("promptTokenCount", "candidatesTokenCount"),
}


def told(name: str, out: bytes) -> tuple[int, int]:
    """Prompt and sampled tokens, as the answer's end has them."""
    prompt, sampled_ = (re.findall(rf'"{key}": ?(\d+)', out.decode()) for key in COUNTS[name])
    return int(prompt[-1]), int(sampled_[-1])


@each
@streaming
def test_tokens_are_told_as_shares_of_the_window_believed_in(name: str, stream: bool) -> None:
    out, call = answered(asked(name, stream=stream)[0], stream=stream)
    room, believed = int(WINDOW * 0.9), MODEL[name][1]
    assert told(name, out) == tuple(-(-n * believed // room) for n in (NUM_PROMPT, NUM_SAMPLED))
    assert call.usage == Usage(NUM_PROMPT, NUM_SAMPLED)  # the engine's own
    assert len(call.completion_token_ids) == NUM_SAMPLED


@each
@streaming
def test_or_as_the_engine_counts(name: str, stream: bool) -> None:
    plain = Settings(usage="engine")
    large = EngineInfo("http://engine", "tiny", max_model_len=1 << 20)
    for exchange in (
        asked(name, stream=stream, settings=plain)[0],
        asked(name, stream=stream, engine=large)[0],
    ):
        out, _ = answered(exchange, stream=stream)
        assert told(name, out) == (NUM_PROMPT, NUM_SAMPLED)


def test_a_harness_may_believe_otherwise_than_others() -> None:
    claude = {"user-agent": "claude-cli/2.1.328 (external, sdk-cli)"}
    settings = Settings(context_windows={"claude-opus-5-5": 0}, window_reserve=0)
    out, _ = answered(asked("anthropic", headers=claude, settings=settings)[0], stream=True)
    assert told("anthropic", out) == (NUM_PROMPT, NUM_SAMPLED)
    settings = Settings(context_windows={"claude-opus-5-5": WINDOW * 2}, window_reserve=0)
    out, _ = answered(asked("anthropic", headers=claude, settings=settings)[0], stream=True)
    assert told("anthropic", out) == (NUM_PROMPT * 2, NUM_SAMPLED * 2)


WORDS = {
    "anthropic": r"prompt is too long: (\d+) tokens > (\d+) maximum",
    "openai_responses": r"exceeds the context window of this model.*?(\d+) tokens, of at most (\d+)",
    "openai_chat": r"resulted in (\d+) tokens",
    "gemini": r"input token count \((\d+)\) exceeds the maximum number of tokens allowed \((\d+)\)",
}


@each
@streaming
def test_an_overflow_names_numbers_that_the_harness_knows(name: str, stream: bool) -> None:
    exchange, _ = asked(name, stream=stream)
    words = f"maximum context length is {WINDOW} tokens. However, your request has 5000 input tokens."
    reply = exchange.reject(400, json.dumps({"error": {"message": words}}).encode())
    assert isinstance(reply, Reply) and reply.status == 400
    found = re.search(WORDS[name], reply.body.decode())
    assert found is not None, reply.body
    assert int(found[1]) == -(-5000 * MODEL[name][1] // int(WINDOW * 0.9))
    assert name == "openai_chat" or int(found[2]) == MODEL[name][1]
    call = exchange.records(delivered=True)[0]
    assert call.error is not None and words in call.error  # the engine's own words


TOO_MUCH = [
    "'max_tokens' or 'max_completion_tokens' is too large: 4000. This model's maximum context length is 4096 "
    "tokens and your request has 1000 input tokens (4000 > 4096 - 1000).",
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (1000 in the "
    "messages, 4000 in the completion). Please reduce the length of the messages or completion.",
]


@each
@pytest.mark.parametrize("words", TOO_MUCH)
def test_room_that_the_engine_lacks_is_cut_down(name: str, words: str) -> None:
    exchange, step = asked(name, max_tokens=4000)
    assert json.loads(step.body)["max_tokens"] == 4000
    refusal = json.dumps({"error": {"message": words}}).encode()
    again = exchange.reject(400, refusal)
    assert isinstance(again, UpstreamRequest)
    assert json.loads(again.body) == json.loads(step.body) | {"max_tokens": 3096}
    reply = exchange.reject(400, refusal)  # an engine that is never content is not asked for ever
    assert isinstance(reply, Reply) and reply.status == 400
    call = exchange.records(delivered=True)[0]
    assert (call.sampling_requested.max_tokens, call.sampling.max_tokens) == (4000, 3096)
    assert call.notes.count(CLAMPED) == 1 and call.upstream_body == again.body


@each
@pytest.mark.parametrize("room", [WINDOW - NUM_PROMPT + 1, WINDOW, 200_000])
def test_room_beyond_the_window_is_recorded_as_what_there_was(name: str, room: int) -> None:
    exchange, step = asked(name, max_tokens=room)
    assert json.loads(step.body).get("max_tokens") == (room if room < WINDOW else None)
    _, call = answered(exchange, stream=True)
    assert call.sampling_requested.max_tokens == room
    assert call.sampling.max_tokens == WINDOW - NUM_PROMPT
    assert CLAMPED in call.notes


@each
def test_room_that_there_is_is_left_as_it_is(name: str) -> None:
    _, call = answered(asked(name, max_tokens=WINDOW - NUM_PROMPT)[0], stream=True)
    assert call.sampling.max_tokens == WINDOW - NUM_PROMPT and CLAMPED not in call.notes
    _, call = answered(asked(name)[0], stream=True)
    assert call.sampling.max_tokens is None and CLAMPED not in call.notes
    _, call = answered(asked(name, max_tokens=9, settings=Settings(max_tokens=5))[0], stream=True)
    assert (call.sampling_requested.max_tokens, call.sampling.max_tokens) == (9, 5)


def test_a_real_overflow_is_not_tried_again_for_room() -> None:
    exchange, _ = asked("anthropic", max_tokens=100)
    words = "This model's maximum context length is 4096 tokens. However, your request has 4096 input tokens."
    assert isinstance(exchange.reject(400, json.dumps({"error": {"message": words}}).encode()), Reply)
    assert CLAMPED not in exchange.records(delivered=True)[0].notes


SAMPLING: dict[str, tuple[dict[str, Any], Sampling]] = {
    "anthropic": (
        {"temperature": 0.3, "top_p": 0.5, "top_k": 7, "max_tokens": 50, "stop_sequences": ["END"]},
        Sampling(0.3, 0.5, 7, 50, ["END"]),
    ),
    "openai_responses": (
        {"temperature": 0.3, "top_p": 0.5, "max_output_tokens": 50},
        Sampling(0.3, 0.5, None, 50),
    ),
    "openai_chat": (
        {"temperature": 0.3, "top_p": 0.5, "max_tokens": 50, "stop": ["END"]},
        Sampling(0.3, 0.5, None, 50, ["END"]),
    ),
    "gemini": (
        {
            "generationConfig": {
                "temperature": 0.3, "topP": 0.5, "topK": 7, "maxOutputTokens": 50, "stopSequences": ["END"]
            }
        },
        Sampling(0.3, 0.5, 7, 50, ["END"]),
    ),
}  # fmt: skip


@each
def test_sampling_is_the_rollouts_and_both_are_recorded(name: str) -> None:
    fields, wanted = SAMPLING[name]
    exchange, step = asked(name, settings=Settings(temperature=0.9, top_p=0.95, top_k=40), **fields)
    body = json.loads(step.body)
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.9, 0.95, 40)
    assert (body["max_tokens"], body.get("stop")) == (50, wanted.stop)
    assert "seed" not in body
    _, call = answered(exchange, stream=True)
    assert call.sampling_requested == wanted
    assert call.sampling == Sampling(0.9, 0.95, 40, 50, wanted.stop)


SEARCH: dict[str, dict[str, Any]] = {
    "anthropic": {
        "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
        "tool_choice": {"type": "tool", "name": "web_search"},
    },
    "openai_responses": {"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}},
    "openai_chat": {"web_search_options": {}},
    "gemini": {"tools": [{"googleSearch": {}}]},
}


@each
@streaming
def test_a_search_of_its_own_is_answered_in_plain_text(name: str, stream: bool) -> None:
    exchange, step = asked(name, stream=stream, **SEARCH[name])
    body = json.loads(step.body)
    assert "tools" not in body and "tool_choice" not in body
    out, call = answered(exchange, stream=stream)
    assert b"Hell" in out and b"tool_use" not in out and b"web_search_call" not in out
    assert (call.role, call.status, call.answer.text if call.answer else "") == (
        "auxiliary", "ok", "Hello there.",
    )  # fmt: skip
    assert [n for n in call.notes if n.startswith("withheld:")]
