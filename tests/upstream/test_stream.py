"""The engine's stream: any split of its bytes gives the same deltas, and no token is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.conformance.scripts import Answer
from polar_mitm.errors import Overflow, PolarError
from polar_mitm.types import Delta, ToolCallDelta, Usage
from polar_mitm.upstream.refusals import rejection
from polar_mitm.upstream.vllm_stream import ChatStream
from tests.support.engine_bytes import PROMPT_IDS, events, sampled, split

answers = st.builds(
    Answer,
    text=st.text(max_size=30),
    reasoning=st.text(max_size=20),
    tool_calls=st.lists(st.tuples(st.just("Bash"), st.just('{"command": "ls é"}')), max_size=2),
    tokens_per_chunk=st.integers(1, 7),
)


def read(*chunks: bytes) -> list[Delta]:
    stream = ChatStream()
    return [delta for chunk in chunks for delta in stream.feed(chunk)]


@given(answers, st.lists(st.integers(0, 100_000), max_size=20))
def test_any_split_gives_the_same_deltas(answer: Answer, cuts: list[int]) -> None:
    data = b"".join(events(answer))
    assert read(*split(data, cuts)) == read(data)


@given(answers)
def test_every_sampled_token_keeps_its_id_and_logprob(answer: Answer) -> None:
    deltas, tokens = read(*events(answer)), sampled(answer)
    assert [i for d in deltas for i in d.token_ids] == [t.token_id for t in tokens]
    assert [p for d in deltas for p in d.logprobs] == [t.logprob for t in tokens]
    assert all(len(d.token_ids) == len(d.logprobs) for d in deltas)
    assert "".join(d.text for d in deltas) == answer.text
    assert "".join(d.reasoning for d in deltas) == answer.reasoning
    assert [d.prompt_token_ids for d in deltas if d.prompt_token_ids] == [PROMPT_IDS]
    assert [d.usage for d in deltas if d.usage] == [Usage(len(PROMPT_IDS), len(tokens))]


def test_a_chunk_with_an_empty_delta_keeps_its_ids() -> None:
    # A parser swallows `<tool_call>`: the tokens were sampled all the same.
    answer = Answer(tool_calls=[("Bash", "{}")], tokens_per_chunk=1)
    silent = [d for d in read(*events(answer)) if d.token_ids and not d.text and not d.tool_calls]
    assert silent
    assert all(len(d.token_ids) == len(d.logprobs) == 1 for d in silent)


def test_tool_calls_come_in_fragments_of_their_index() -> None:
    answer = Answer(tool_calls=[("Bash", '{"a": 1}'), ("Read", "{}")], tokens_per_chunk=3)
    parts = [part for delta in read(*events(answer)) for part in delta.tool_calls]
    assert [p.name for p in parts if p.name] == ["Bash", "Read"]
    for index, arguments in enumerate(['{"a": 1}', "{}"]):
        assert "".join(p.arguments for p in parts if p.index == index) == arguments


def test_done_only_at_the_end_and_fingerprint() -> None:
    stream = ChatStream()
    *body, done = events(Answer(text="hi"))
    for event in body:
        list(stream.feed(event))
        assert not stream.done
    assert stream.fingerprint == "vllm-0.32.0-scripted"
    list(stream.feed(done))
    assert stream.done


def sse(**chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def choice(**fields: Any) -> bytes:
    return sse(choices=[{"index": 0, "delta": {}, **fields}])


@pytest.mark.parametrize(
    ("wire", "delta"),
    [
        (choice(delta={"reasoning_content": "older name"}), Delta(reasoning="older name")),
        (choice(delta={"content": None}, token_ids=None, logprobs=None), Delta()),
        (choice(finish_reason="length", stop_reason=None), Delta(finish_reason="length")),
        (choice(finish_reason="stop", stop_reason="END"), Delta(finish_reason="stop", stop_reason="END")),
        (choice(finish_reason="stop", stop_reason=7), Delta(finish_reason="stop", stop_reason=7)),
        (choice(finish_reason="abort"), Delta(finish_reason="abort")),
        (choice(finish_reason="something new"), Delta(finish_reason="stop")),
        (
            choice(delta={"tool_calls": [{"index": 3, "function": {"arguments": None}}]}),
            Delta(tool_calls=[ToolCallDelta(3)]),
        ),
        (
            sse(
                choices=[],
                usage={
                    "prompt_tokens": 9,
                    "completion_tokens": None,
                    "prompt_tokens_details": {"cached_tokens": 4},
                    "completion_tokens_details": {"reasoning_tokens": 2},
                },
            ),
            Delta(usage=Usage(9, 0, 4, 2)),
        ),
        (
            sse(choices=[], usage={"prompt_tokens": 9, "prompt_tokens_details": None}),
            Delta(usage=Usage(9)),
        ),
    ],
)
def test_fields(wire: bytes, delta: Delta) -> None:
    assert read(wire) == [delta]


@pytest.mark.parametrize(
    "wire", [b": ping\n\n", sse(choices=[]), sse(id="x", object="y", more=[1]), b"data: [DONE]\n\n"]
)
def test_events_without_news_give_nothing(wire: bytes) -> None:
    assert read(wire) == []


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (b"data: {not json\n\n", "engine stream"),
        (b"data: [1]\n\n", "engine stream"),
        (b"data: \xff\n\n", "engine stream"),
        (b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', "engine stream"),
        (b'data: {"error":' + b"[" * 100_000 + b"\n\n", "engine stream"),
        (choice(token_ids=["1"]), "engine stream"),
        (choice(token_ids=[1.5]), "engine stream"),
        (choice(logprobs={"content": [{"logprob": None}]}), "engine stream"),
        (sse(error={"message": "out of memory", "code": 500}), "engine error: out of memory"),
        (sse(error="plain words"), "engine error: plain words"),
        (sse(error={"error": {"message": "nested"}}), "engine error: nested"),
        (b"x" * (17 << 20), "longer than"),
    ],
)
def test_a_broken_stream_is_an_upstream_error_after_what_came_before(wire: bytes, words: str) -> None:
    stream, got = ChatStream(), []
    with pytest.raises(PolarError, match=words) as caught:
        for chunk in (choice(delta={"content": "kept"}), wire):
            for delta in stream.feed(chunk):
                got.append(delta.text)
    assert caught.value.kind == "upstream"
    assert got == ["kept"]


def test_what_comes_after_done_is_not_read() -> None:
    late = choice(delta={"content": "late"})
    *body, done = events(Answer(text="hi"))
    for chunks in ([*body, done, late], [*body, done + late], [*body, done + b"data: {nonsense\n\n"]):
        assert read(*chunks) == read(*body)


@given(st.binary(max_size=200))
def test_any_bytes_give_deltas_or_our_error(data: bytes) -> None:
    try:
        read(data, b"data: " + data + b"\n\n")
    except PolarError as error:
        assert error.kind == "upstream"


# --- an engine that refuses ------------------------------------------------------------------------------


def vllm_error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "X", "param": None, "code": 1}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, vllm_error("This model's maximum context length is 8 tokens."), "context_overflow", "8 tokens"),
        (400, vllm_error("The prompt is longer than the maximum model length"), "context_overflow", "longer"),
        (400, vllm_error("bad tool schema"), "bad_request", "refused the request: bad tool schema"),
        (422, b'{"detail": "x"}', "bad_request", "detail"),
        (413, b"", "bad_request", "no body"),
        (401, vllm_error("key"), "overloaded", "engine answered 401: key"),
        (404, vllm_error("no such model"), "overloaded", "engine answered 404: no such model"),
        (429, b"slow down", "overloaded", "engine answered 429: slow down"),
        (500, b"<html>" + b"x" * 10_000, "overloaded", "engine answered 500: <html>"),
        (502, b"\xff\xfe", "overloaded", "engine answered 502"),
        (502, b'"\xff"', "overloaded", "engine answered 502"),
        (400, b"[" * 100_000, "bad_request", r"refused the request: \[\["),
        (503, b"[1, 2]", "overloaded", r"engine answered 503: \[1, 2\]"),
        (307, b"", "overloaded", "engine answered 307"),
    ],
)
def test_what_a_refusal_means_to_the_harness(status: int, body: bytes, kind: str, words: str) -> None:
    error = rejection(status, body, 7)
    assert (error.kind, error.status) == (kind, status)
    with pytest.raises(PolarError, match=words):
        raise error
    assert error.retry_after_s == (7 if kind == "overloaded" else None)
    assert len(error.message) < 600


WINDOW = "This model's maximum context length is 4096 tokens"


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (f"{WINDOW}. However, your prompt contains at least 4097 input tokens, which", Overflow(4097, 4096)),
        (f"{WINDOW}. However, your request has 5000 input tokens. Please", Overflow(5000, 4096)),
        (
            "You passed 4097 input tokens and requested 1 output tokens. However, the model's context length "
            "is only 4096 tokens, resulting in a maximum input length of 4095 tokens.",
            Overflow(4097, 4096),
        ),
        ("Input length (5000) exceeds model's maximum context length (4096).", Overflow(5000, 4096)),
        (
            "The decoder prompt (length 5000) is longer than the maximum model length of 4096. Make sure",
            Overflow(5000, 4096),
        ),
        (
            "The decoder prompt (length 4096) plus the number of requested output tokens (at least 1) is "
            "longer than the maximum model length of 4096.",
            Overflow(4096, 4096),
        ),
        (
            f"'max_tokens' or 'max_completion_tokens' is too large: 4000. {WINDOW} and your request has 1000 "
            "input tokens (4000 > 4096 - 1000).",
            Overflow(1000, 4096),
        ),
        (
            f"{WINDOW}. However, you requested 5000 tokens (1000 in the messages, 4000 in the completion).",
            Overflow(1000, 4096),
        ),
        (
            f"{WINDOW}. However, your prompt contains 90000 characters (more than 65536 characters, which is "
            "the upper bound for 4096 input tokens).",
            None,  # nobody has counted
        ),
        (f"{WINDOW}.", None),
    ],
)
def test_an_overflow_names_its_numbers(words: str, numbers: Overflow | None) -> None:
    """The words of several versions of vLLM."""
    error = rejection(400, vllm_error(words), 5)
    assert (error.kind, error.overflow) == ("context_overflow", numbers)
