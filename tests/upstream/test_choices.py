"""Several answers to one request, the logprobs that a client is shown, and grammars, as vLLM has them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.conformance.scripts import Answer
from polar_mitm.errors import PolarError
from polar_mitm.types import (
    ChatRequest,
    Delta,
    Message,
    Sampling,
    TextPart,
    TokenLogprob,
    Tool,
    ToolChoice,
    Usage,
)
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm.upstream.vllm import build_body, notes
from polar_mitm.upstream.vllm_stream import ChatStream
from tests.support.engine_bytes import PROMPT_IDS, events, sampled, split

USER = Message("user", [TextPart("go")])
TOOL = Tool("Bash", "run", {"type": "object"})
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def asking(**fields: Any) -> ChatRequest:
    return ChatRequest("m", [USER], **fields)


def body(**fields: Any) -> dict[str, Any]:
    made = build_body(asking(**fields), Sampling(1.0, 1.0, 0), EngineInfo("http://engine", "tiny"))
    result: dict[str, Any] = msgspec.json.decode(made)
    return result


def read(*chunks: bytes, n: int = 1, top: int | None = None) -> list[Delta]:
    stream = ChatStream(n, top)
    return [delta for chunk in chunks for delta in stream.feed(chunk)]


# --- several answers ------------------------------------------------------------------------------------

MANY = Answer(text="one", others=[Answer(text="the second"), Answer(tool_calls=[("Bash", '{"a": 1}')])])


def test_as_many_answers_as_asked_for_and_nothing_said_of_one() -> None:
    assert body(n=3)["n"] == 3
    assert "n" not in body()


@given(st.lists(st.integers(0, 100_000), max_size=20))
def test_every_token_is_of_its_answer_whatever_the_split(cuts: list[int]) -> None:
    data = b"".join(events(MANY, n=3))
    deltas = read(*split(data, cuts), n=3)
    assert deltas == read(data, n=3)
    for number, answer in enumerate([MANY, *MANY.others]):
        own, tokens = [d for d in deltas if d.choice == number], sampled(answer)
        assert [i for d in own for i in d.token_ids] == [t.token_id for t in tokens]
        assert [p for d in own for p in d.logprobs] == [t.logprob for t in tokens]
        assert "".join(d.text for d in own) == answer.text
        assert [d.finish_reason for d in own if d.finish_reason] == ["tool_calls" if number == 2 else "stop"]
    total = sum(len(sampled(answer)) for answer in (MANY, *MANY.others))
    assert [d.usage for d in deltas if d.usage] == [Usage(len(PROMPT_IDS), total)]
    assert [d.prompt_token_ids for d in deltas if d.prompt_token_ids] == [PROMPT_IDS] * 3


def test_several_choices_in_one_chunk_are_a_delta_each() -> None:
    def choice(index: int) -> dict[str, Any]:
        logprobs = {"content": [{"logprob": -0.5}]}
        return {
            "index": index,
            "delta": {"content": str(index)},
            "token_ids": [7 + index],
            "logprobs": logprobs,
        }

    usage = {"prompt_tokens": 2, "completion_tokens": 2}
    chunk = {"choices": [choice(1), choice(0)], "prompt_token_ids": [1, 2], "usage": usage}
    first, second = read(b"data: " + json.dumps(chunk).encode() + b"\n\n", n=2)
    assert (first.choice, first.text, first.token_ids, first.logprobs) == (1, "1", [8], [-0.5])
    assert (second.choice, second.text, second.token_ids) == (0, "0", [7])
    assert (first.prompt_token_ids, first.usage) == ([1, 2], Usage(2, 2))
    assert (second.prompt_token_ids, second.usage) == (None, None)  # said once


@pytest.mark.parametrize("index", [-1, 1, 7])
def test_a_choice_that_nobody_asked_for_is_no_answer(index: int) -> None:
    chunk = {"choices": [{"index": index, "delta": {"content": "x"}}]}
    with pytest.raises(PolarError, match="choice") as error:
        read(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    assert error.value.kind == "upstream"


# --- what a client is shown -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sent"), [(None, 0), (0, 0), (1, 2), (5, 6), (19, 20), (20, 20), (21, 20), (500, 20)]
)
def test_one_more_than_asked_for_up_to_the_engines_limit(asked: int | None, sent: int) -> None:
    # vLLM puts the sampled token first and counts it: with 1 it shows nothing but that.
    assert body(top_logprobs=asked)["top_logprobs"] == sent
    assert ("capped:top_logprobs" in notes(asking(top_logprobs=asked))) == ((asked or 0) > 20)


@pytest.mark.parametrize("top", [0, 1, 3])
def test_the_likeliest_tokens_at_each_place(top: int) -> None:
    answer = Answer(text="Hé", tokens_per_chunk=2)
    asked = body(top_logprobs=top)
    deltas = read(*events(answer, top_logprobs=asked["top_logprobs"]), top=top)
    shown, tokens = [p for d in deltas for p in d.shown_logprobs], sampled(answer)
    every = [t.logprob for t in tokens]
    assert [p for d in deltas for p in d.logprobs] == every == [p.logprob for p in shown]
    # The end came in one chunk with the last of the text.
    assert bytes(b for p in shown for b in p.bytes or []) == "Hé<|im_end|>".encode()
    for place in shown:
        ranked = [each.logprob for each in place.top]
        assert len(ranked) == top and ranked == sorted(ranked, reverse=True)
        rivals = [-r / 4 for r in range(1, top + 1)]  # as the scripted engine makes them
        assert ranked == sorted([place.logprob, *rivals], reverse=True)[:top]


def test_nobody_pays_for_what_nobody_asked_to_see() -> None:
    assert not any(d.shown_logprobs for d in read(*events(Answer(text="hi"), top_logprobs=3)))


def test_an_engine_without_logprobs_shows_none() -> None:
    deltas = read(*events(Answer(text="hi", omit_logprobs=True)), top=2)
    assert [i for d in deltas for i in d.token_ids] and not any(d.shown_logprobs for d in deltas)


def test_only_the_tokens_of_the_text_are_shown() -> None:
    answer = Answer(text="Hé", reasoning="Hm.", tool_calls=[("f", "{}")], tokens_per_chunk=1)
    deltas = read(*events(answer, top_logprobs=1), top=1)
    assert all(d.text for d in deltas if d.shown_logprobs)
    assert bytes(b for d in deltas for p in d.shown_logprobs for b in p.bytes or []) == "</think>Hé".encode()
    assert len([p for d in deltas for p in d.logprobs]) == len(sampled(answer))


def test_a_token_is_shown_as_the_engine_writes_it() -> None:
    place = {
        "token": "a", "logprob": -2.0, "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -2.0, "bytes": [97]}, {"token": "b", "logprob": -0.25}],
    }  # fmt: skip
    chunk = {
        "choices": [
            {"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [place]}, "token_ids": [5]}
        ]
    }
    (delta,) = read(b"data: " + json.dumps(chunk).encode() + b"\n\n", top=1)
    assert delta.shown_logprobs == [TokenLogprob("a", -2.0, [97], [TokenLogprob("b", -0.25)])]
    assert delta.logprobs == [-2.0]


# --- grammars -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "guided", "said"),
    [
        ({}, False, []),
        ({"tools": [TOOL]}, False, []),
        ({"response_schema": SCHEMA}, True, ["guided:json_schema"]),
        ({"response_schema": {}}, True, ["guided:json_schema"]),
        ({"response_schema": SCHEMA, "tools": [TOOL]}, False, ["unguided:json_schema"]),
        (
            {"response_schema": SCHEMA, "tools": [TOOL], "tool_choice": ToolChoice("none")},
            True,
            ["guided:json_schema"],
        ),
        ({"tools": [TOOL], "tool_choice": ToolChoice("required")}, False, ["guided:tool_choice"]),
        ({"tools": [TOOL], "tool_choice": ToolChoice("tool", "Bash")}, False, ["guided:tool_choice"]),
        (
            {"response_schema": SCHEMA, "tools": [TOOL], "tool_choice": ToolChoice("required")},
            False,
            ["unguided:json_schema", "guided:tool_choice"],
        ),
        ({"tool_choice": ToolChoice("required")}, False, []),  # of no tools
    ],
)
def test_what_a_grammar_shapes_is_noted(fields: dict[str, Any], guided: bool, said: list[str]) -> None:
    assert ("response_format" in body(**fields)) == guided
    assert notes(asking(**fields)) == said


def test_a_schema_is_sent_as_it_is() -> None:
    schema = {"type": "object", "properties": {"é": {"enum": [1, None]}}, "$defs": {"a": {}}}
    sent = body(response_schema=schema)["response_format"]
    assert sent == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
