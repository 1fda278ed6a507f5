"""Canonical answers to Chat Completions chunks; the official SDK is the oracle."""

import json
import math
from collections.abc import Iterable
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.custom_tool import INPUT_SCHEMA, unwrap
from polar_mitm.dialects.ids import minted, sibling
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.types import (
    ChatRequest,
    Delta,
    Message,
    TextPart,
    TokenLogprob,
    Tool,
    ToolCallDelta,
    Usage,
)
from tests.dialects.chat_sdk import (
    ASK,
    CALL,
    CREATED,
    DIALECT,
    chunks,
    client,
    completion_of,
    read,
    snapshot,
    stream_of,
    streamed,
)

TOOLS = [
    Tool("bash", parameters={"type": "object"}),
    Tool("read", parameters={"type": "object"}),
    Tool("patch", parameters=INPUT_SCHEMA, kind="custom"),
]
LEGACY = {"tools": TOOLS[:1], "notes": ["mapped:functions"]}


def request(**fields: Any) -> ChatRequest:
    return ChatRequest("qwen-of-today", [Message("user", [TextPart("hi")])], **({"tools": TOOLS} | fields))


def call(index: int, name: str | None, arguments: str, choice: int = 0) -> Delta:
    return Delta(tool_calls=[ToolCallDelta(index, name, arguments)], choice=choice)


def deltas_of(wire: bytes, choice: int = 0) -> list[dict[str, Any]]:
    """What each chunk of one answer adds, without the first, which says the role, and without the last."""
    choices = [c for chunk in chunks(wire) for c in chunk["choices"] if c["index"] == choice]
    first, *middle, last = [c["delta"] for c in choices]
    assert first == {"role": "assistant", "content": "", "refusal": None} and last == {}
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    return middle


def reason(wire: bytes) -> str:
    return [c for chunk in chunks(wire) for c in chunk["choices"]][-1]["finish_reason"]


# --- chunks ---------------------------------------------------------------------------------------------


def test_text():
    wire = stream_of(request(), [Delta("Hel"), Delta("lo"), Delta(token_ids=[1])])
    assert deltas_of(wire) == [{"content": "Hel"}, {"content": "lo"}]
    assert reason(wire) == "stop"
    for chunk in chunks(wire):
        assert (chunk["id"], chunk["object"]) == (minted("chatcmpl", CALL), "chat.completion.chunk")
        assert (chunk["created"], chunk["model"]) == (1732100000, "qwen-of-today")
        assert "usage" not in chunk and chunk["choices"]


def test_reasoning_has_two_names_and_the_same_text():
    wire = stream_of(request(), [Delta(reasoning="be"), Delta(reasoning="cause"), Delta("so", reasoning="!")])
    assert deltas_of(wire) == [
        {"reasoning_content": "be", "reasoning": "be"},
        {"reasoning_content": "cause", "reasoning": "cause"},
        {"reasoning_content": "!", "reasoning": "!"},
        {"content": "so"},
    ]


def test_openrouter_says_it_a_third_time():
    asked = DIALECT.decode(json.dumps(ASK).encode(), {}, "/api/v1/chat/completions")
    detail = {"type": "reasoning.text", "format": "unknown", "index": 0}
    deltas = [Delta(reasoning="be"), Delta(reasoning="cause"), Delta("so")]
    said = deltas_of(stream_of(asked, deltas))
    assert [each.get("reasoning_details") for each in said] == [
        [detail | {"text": "be"}],
        [detail | {"text": "cause"}],
        None,
    ]
    message = read(asked, completion_of(asked, deltas)).choices[0].message.to_dict()
    assert message["reasoning_details"] == [detail | {"text": "because"}]


def test_hidden_reasoning_is_not_sent():
    wire = stream_of(request(show_reasoning=False), [Delta(reasoning="secret"), Delta("so")])
    assert deltas_of(wire) == [{"content": "so"}] and b"secret" not in wire


def test_calls_in_parallel():
    wire = stream_of(request(), [call(0, "bash", '{"a":'), call(0, None, " 1}"), call(1, "read", '{"b":{}}')])
    assert deltas_of(wire) == [
        _begun(0, "bash", '{"a":'),
        _more(0, " 1"),
        _begun(1, "read", '{"b":{'),
        _more(0, "}"),
        _more(1, "}}"),
    ]
    assert reason(wire) == "tool_calls"


def _begun(index: int, name: str, arguments: str) -> dict[str, Any]:
    head = {"index": index, "id": minted("call", CALL, index), "type": "function"}
    return {"tool_calls": [{**head, "function": {"name": name, "arguments": arguments}}]}


def _more(index: int, arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def test_no_call_is_whole_before_the_end():
    """The AI SDK runs a call as soon as its arguments parse, which must not be before it is recorded."""
    encoder = DIALECT.encoder(request(), CALL, CREATED)
    pieces = ['{"a":', '{"b": "}', ' "}', "}", " \n", ""]
    said = "".join(
        each["function"]["arguments"]
        for at, piece in enumerate(pieces)
        for each in _fragments(encoder.delta(call(0, None if at else "bash", piece)))
    )
    assert said == '{"a":{"b": "} "'
    end = completion_of(request(), [call(0, "bash", "".join(pieces))])
    rest = _fragments(encoder.finish(end).replace(b"data: [DONE]\n\n", b""))
    assert said + rest[0]["function"]["arguments"] == "".join(pieces)


def _fragments(wire: bytes) -> list[dict[str, Any]]:
    events = (json.loads(line.removeprefix("data: ")) for line in wire.decode().split("\n\n") if line)
    return [t for event in events for c in event["choices"] for t in c["delta"].get("tool_calls", [])]


def test_custom_calls_stream_their_unwrapped_input():
    wire = stream_of(request(), [call(0, "patch", '{"input": "te'), call(0, None, 'xt\\n}"}')])
    head = {"index": 0, "id": minted("call", CALL, 0), "type": "custom"}
    assert deltas_of(wire) == [
        {"tool_calls": [{**head, "custom": {"name": "patch", "input": "te"}}]},
        {"tool_calls": [{"index": 0, "custom": {"input": "xt\n}"}}]},
    ]


def test_custom_input_that_is_settled_only_at_the_end_is_still_streamed():
    wire = stream_of(request(), [call(0, "patch", '{"x": 1, "input": "late"}')])
    pieces = [d["tool_calls"][0]["custom"]["input"] for d in deltas_of(wire)]
    assert pieces == ["", "late"]


def test_calls_are_numbered_as_they_begin_and_named_by_the_engines_number():
    """The SDK's accumulator takes the first call for number 0."""
    wire = stream_of(request(), [call(2, "bash", "{}"), call(5, "read", "{}")])
    heads = [d["tool_calls"][0] for d in deltas_of(wire) if "id" in d["tool_calls"][0]]
    assert [(h["index"], h["id"]) for h in heads] == [
        (0, minted("call", CALL, 2)), (1, minted("call", CALL, 5)),
    ]  # fmt: skip


def test_a_tool_nobody_offered_is_passed_on_as_a_function():
    assert deltas_of(stream_of(request(), [call(0, "made_up", "[1]")]))[0] == _begun(0, "made_up", "[1]")


def test_the_first_form_of_tools():
    asked = request(**LEGACY)
    deltas = [call(0, "bash", '{"a":'), call(0, None, "1}"), call(1, "bash", "{}")]
    wire = stream_of(asked, deltas)
    assert deltas_of(wire) == [
        {"function_call": {"name": "bash", "arguments": '{"a":'}},
        {"function_call": {"arguments": "1"}},
        {"function_call": {"arguments": "}"}},
    ]
    assert reason(wire) == "function_call"
    for answer in (snapshot(wire), read(asked, completion_of(asked, deltas))):
        message = answer.choices[0].message
        assert message.tool_calls is None and message.function_call is not None
        assert (message.function_call.name, message.function_call.arguments) == ("bash", '{"a":1}')


# --- several answers ------------------------------------------------------------------------------------


def test_several_answers():
    asked = request(n=3)
    deltas = [
        Delta("a", choice=1), Delta("b"), call(0, "bash", "{}", choice=2), Delta("c", choice=1),
    ]  # fmt: skip
    wire = stream_of(asked, deltas)
    assert deltas_of(wire, 0) == [{"content": "b"}]
    assert deltas_of(wire, 1) == [{"content": "a"}, {"content": "c"}]
    (begun, _) = deltas_of(wire, 2)
    assert begun["tool_calls"][0]["id"] == minted("call", sibling(CALL, 2), 0)
    whole = read(asked, completion_of(asked, deltas))
    for answer in (snapshot(wire), whole):
        assert [c.index for c in answer.choices] == [0, 1, 2]
        assert [c.message.content or "" for c in answer.choices] == ["b", "ac", ""]
        assert [c.finish_reason for c in answer.choices] == ["stop", "stop", "tool_calls"]
        assert answer.choices[2].message.tool_calls[0].id == minted("call", sibling(CALL, 2), 0)


def test_an_answer_of_several_that_has_no_end_breaks_the_whole():
    asked = request(n=2)
    done = completion_of(asked, [Delta("a"), Delta("b", choice=1)])
    done.others[0].finish_reason = None
    assert b"broke off" in DIALECT.encoder(asked, CALL, CREATED).finish(done)
    assert DIALECT.encode(asked, done, CALL, CREATED).status == 500


# --- logprobs -------------------------------------------------------------------------------------------

HEL = TokenLogprob("Hel", -0.5, [72, 101, 108], [TokenLogprob("Hel", -0.5, [72, 101, 108])])
LO = TokenLogprob("lo", -math.inf, [108, 111])


def test_logprobs():
    asked = request(top_logprobs=1)
    deltas = [Delta("Hel", shown_logprobs=[HEL]), Delta(reasoning="Hm"), Delta("lo", shown_logprobs=[LO])]
    wire = stream_of(asked, deltas)
    assert [d["content"] for d in deltas_of(wire) if "content" in d] == ["Hel", "lo"]
    for answer in (snapshot(wire), read(asked, completion_of(asked, deltas))):
        shown = answer.choices[0].logprobs
        assert shown is not None and shown.content is not None
        assert [(t.token, t.logprob, t.bytes) for t in shown.content] == [
            ("Hel", -0.5, [72, 101, 108]), ("lo", -9999.0, [108, 111]),
        ]  # fmt: skip
        assert [len(t.top_logprobs) for t in shown.content] == [1, 0]


def test_logprobs_of_a_delta_with_several_parts_are_given_once():
    asked = request(top_logprobs=0)
    wire = stream_of(asked, [Delta("a", "b", [ToolCallDelta(0, "bash", "{}")], shown_logprobs=[HEL, LO])])
    given = [c["logprobs"] for chunk in chunks(wire) for c in chunk["choices"] if c["logprobs"]]
    assert [[t["token"] for t in each["content"]] for each in given] == [["Hel", "lo"]]


def test_nobody_asked_for_logprobs():
    assert read(request(), completion_of(request(), [Delta("x")])).choices[0].logprobs is None


# --- ends -----------------------------------------------------------------------------------------------

USAGE = Usage(100, 20, 30, 5)
COUNTS = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 30},
    "completion_tokens_details": {"reasoning_tokens": 5},
}


def test_usage_comes_last_and_only_where_it_was_asked_for():
    *before, last = chunks(stream_of(request(stream_usage=True), [Delta("x")], usage=USAGE))
    assert (last["choices"], last["usage"]) == ([], COUNTS)
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in before)
    whole = json.loads(DIALECT.encode(request(), completion_of(request(), [], usage=USAGE), CALL, 0).body)
    assert whole["usage"] == COUNTS


def test_usage_of_several_answers_counts_one_prompt():
    asked = request(n=2, stream_usage=True)
    usage = chunks(stream_of(asked, [], prompt_token_ids=[1, 2, 3], completion_token_ids=[4, 5]))[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 4, 7)


@pytest.mark.parametrize(
    ("finish_reason", "with_call", "want"),
    [
        ("stop", False, "stop"),
        ("stop", True, "tool_calls"),
        ("tool_calls", True, "tool_calls"),
        ("length", False, "length"),
        ("length", True, "length"),
        ("content_filter", False, "content_filter"),
    ],
)
def test_finish_reasons(finish_reason: Any, with_call: bool, want: str):
    deltas = [call(0, "bash", '{"half')] if with_call else [Delta("half")]
    wire = stream_of(request(), deltas, finish_reason=finish_reason)
    assert reason(wire) == want
    whole = read(request(), completion_of(request(), deltas, finish_reason=finish_reason))
    assert whole.choices[0].finish_reason == want


def test_an_aborted_answer_is_an_error():
    wire = stream_of(request(), [Delta("half")], finish_reason="abort")
    with pytest.raises(openai.APIError, match="broke off"):
        streamed(wire)
    assert (
        DIALECT.encode(request(), completion_of(request(), [], finish_reason="abort"), CALL, 0).status == 500
    )


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("overloaded", "server_is_overloaded", "why"),
        ("upstream", "server_error", "why"),
        ("internal", "server_error", "why"),
        ("bad_request", None, "why"),
        ("context_overflow", "context_length_exceeded", "maximum context length"),
    ],
)
def test_errors_in_a_stream(kind: ErrorKind, code: str | None, words: str):
    encoder = DIALECT.encoder(request(), CALL, CREATED)
    wire = encoder.start() + encoder.delta(Delta("half")) + encoder.error(PolarError(kind, "why"))
    assert b"[DONE]" not in wire, "to who does not look for errors, the stream is cut"
    sdk = client(Reply(200, wire, DIALECT.stream_headers(CALL)))
    said = []
    with pytest.raises(openai.APIError, match=words) as caught:
        said += [c.choices[0].delta.content for c in sdk.chat.completions.create(**ASK, stream=True)]
    assert caught.value.code == code


def test_keepalives_are_comments_that_the_sdk_passes_over():
    encoder = DIALECT.encoder(request(), CALL, CREATED)
    wire = encoder.start() + encoder.keepalive() + encoder.delta(Delta("x")) + encoder.keepalive()
    wire += encoder.finish(completion_of(request(), [Delta("x")]))
    assert encoder.keepalive().startswith(b":")
    assert snapshot(wire).choices[0].message.content == "x"


def test_the_streaming_helper_parses_structured_output_and_strict_calls():
    tool = {"name": "bash", "strict": True, "parameters": {"type": "object", "properties": {}}}
    deltas = [Delta('{"a":'), Delta(" 1}"), call(0, "bash", '{"b"'), call(0, None, ": 2}")]
    sdk = client(Reply(200, stream_of(request(stream_usage=True), deltas), DIALECT.stream_headers(CALL)))
    with sdk.chat.completions.stream(**ASK, tools=[{"type": "function", "function": tool}]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.done") == kinds.count("tool_calls.function.arguments.done") == 1
    assert final.usage is not None and final.choices[0].message.content == '{"a": 1}'
    (made,) = final.choices[0].message.tool_calls or []
    assert made.function.parsed_arguments == {"b": 2}


# --- properties -----------------------------------------------------------------------------------------

_text = st.text(st.characters(codec="utf-8"), max_size=20)
_words = _text | st.sampled_from(["", " ", "\n\n", "Hello"])
_arguments = st.one_of(
    _text.map(lambda t: json.dumps({"input": t})),
    st.sampled_from(["", "{}", "{}}", '{"input": "cut', "plain", '{"a": {"b": {}}}\n', "} }"]),
    _text,
)
_functions = st.sampled_from(["bash", "read", "unknown"])


@st.composite
def _answers(draw: st.DrawFn, num: int, names: st.SearchStrategy[str]) -> list[Delta]:
    """Answers as engines give them, split anywhere and interleaved."""

    def split(text: str) -> list[str]:
        at = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
        return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]

    threads: list[list[Delta]] = []
    for choice in range(num):
        pieces = [Delta(reasoning=r, choice=choice) for r in split(draw(_words))]
        pieces += [Delta(t, choice=choice) for t in split(draw(_words))]
        calls = draw(st.lists(st.tuples(names, _arguments), max_size=3))
        for index, (name, arguments) in enumerate(calls):
            first, *more = split(arguments)
            pieces += [call(index, name, first, choice), *(call(index, None, m, choice) for m in more)]
        threads.append(pieces)
    order = draw(st.permutations([choice for choice, each in enumerate(threads) for _ in each]))
    return [threads[choice].pop(0) for choice in order]


def _plain(answer: Any) -> dict[str, Any]:
    """An answer without what differs between a stream and a whole answer, and what the SDK adds to it."""
    out = answer.to_dict()
    for choice in out["choices"]:
        message = choice["message"]
        message.pop("annotations", None)
        choice["message"] = message = {k: v for k, v in message.items() if v is not None} | {
            "content": message.get("content") or ""
        }
        for made in message.get("tool_calls") or []:
            made.pop("index", None)
            if function := made.get("function"):
                function.pop("parsed_arguments", None)
        choice["logprobs"] = choice.get("logprobs")
    for name in ("object", "system_fingerprint"):
        out.pop(name, None)
    return out


_some = st.integers(1, 3)
_reasons = st.sampled_from(["stop", "tool_calls", "length"])


@given(_some.flatmap(lambda n: st.tuples(st.just(n), _answers(n, _functions))), st.booleans(), _reasons)
def test_any_split_gives_the_answer_that_is_given_without_a_stream(
    answers: tuple[int, list[Delta]], shown: bool, finish_reason: Any
):
    num, deltas = answers
    asked = request(n=num, show_reasoning=shown, stream_usage=True)
    ends = {"finish_reason": finish_reason, "usage": Usage(3, 2)}
    wire = stream_of(asked, deltas, **ends)
    whole = read(asked, completion_of(asked, deltas, **ends))
    assert _plain(snapshot(wire)) == _plain(whole)
    assert all(chunk.model_validate(chunk.to_dict()) for chunk in streamed(wire))


@given(_answers(1, _functions))
def test_the_streaming_helper_rebuilds_what_we_emitted(deltas: list[Delta]):
    sdk = client(Reply(200, stream_of(request(stream_usage=True), deltas), DIALECT.stream_headers(CALL)))
    with sdk.chat.completions.stream(**ASK) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "".join(e.delta for e in events if e.type == "content.delta") == final.choices[0].message.content
    want = completion_of(request(), deltas).message
    assert final.choices[0].message.content == want.text
    made = final.choices[0].message.tool_calls or []
    assert [(c.id, c.function.name, c.function.arguments) for c in made] == [
        (c.id, c.name, c.arguments) for c in want.tool_calls
    ]


@given(_answers(1, st.sampled_from(["bash", "patch"])), st.booleans())
def test_history_that_comes_back_is_what_was_sampled(deltas: list[Delta], streaming: bool):
    asked = request()
    said = _folded(chunks(stream_of(asked, deltas))) if streaming else _message(asked, deltas)
    body = json.dumps({**ASK, "messages": [*ASK["messages"], said]})
    turn = DIALECT.decode(body.encode(), {}, "").messages[1]
    want = completion_of(asked, deltas).message
    assert (turn.text, turn.reasoning) == (want.text, want.reasoning)
    assert [(c.id, c.name, c.kind) for c in turn.tool_calls] == [
        (c.id, c.name, c.kind) for c in want.tool_calls
    ]
    assert [c.arguments for c in turn.tool_calls] == [
        unwrap(c.arguments) if c.kind == "custom" else c.arguments for c in want.tool_calls
    ]
    assert turn.minted_ids == [c.id for c in want.tool_calls]


def _message(asked: ChatRequest, deltas: list[Delta]) -> dict[str, Any]:
    body = DIALECT.encode(asked, completion_of(asked, deltas), CALL, CREATED).body
    message: dict[str, Any] = json.loads(body)["choices"][0]["message"]
    return message


def _folded(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A client's own way to fold chunks: custom calls too, which the SDK's accumulator does not know."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for delta in (c["delta"] for event in events for c in event["choices"]):
        message["content"] += delta.get("content") or ""
        if thought := delta.get("reasoning"):
            message["reasoning"] = message.get("reasoning", "") + thought
        for part in delta.get("tool_calls", []):
            if "id" in part:
                message["tool_calls"].append(part)
                continue
            made = message["tool_calls"][part["index"]][kind := "custom" if "custom" in part else "function"]
            field = "input" if kind == "custom" else "arguments"
            made[field] += part[kind][field]
    return message


_any_delta = st.builds(
    Delta,
    text=_words,
    reasoning=_words,
    tool_calls=st.lists(
        st.builds(ToolCallDelta, st.integers(0, 2), st.sampled_from(["bash", "patch", None]), _arguments),
        max_size=3,
    ),
    shown_logprobs=st.lists(
        st.builds(TokenLogprob, _words, st.floats(), st.none() | st.lists(st.integers(0, 255))), max_size=2
    ),
    choice=st.integers(0, 1),
)


@given(st.lists(_any_delta, max_size=6))
def test_whatever_an_engine_says_the_sdk_reads(deltas: list[Delta]):
    asked = request(n=2, top_logprobs=2, stream_usage=True)
    wire = stream_of(asked, deltas)
    assert json.loads(json.dumps(chunks(wire), allow_nan=False)) == chunks(wire)
    assert len(streamed(wire)) == len(chunks(wire))
    assert len(read(asked, completion_of(asked, deltas)).choices) == 2
