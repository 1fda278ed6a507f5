"""Canonical answers to Responses events; the official SDK is the oracle."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from polar_mitm.dialects.custom_tool import INPUT_SCHEMA, unwrap
from polar_mitm.dialects.ids import minted, unseal
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.types import (
    ChatRequest,
    Delta,
    Message,
    Sampling,
    TextPart,
    TokenLogprob,
    Tool,
    ToolCallDelta,
    ToolChoice,
    Usage,
)
from tests.dialects.responses_sdk import (
    CALL,
    CREATED,
    DIALECT,
    client,
    completion_of,
    events,
    rebuilt,
    stream_of,
    streaming,
)

TOOLS = [
    Tool("bash", parameters={"type": "object"}),
    Tool("exec", parameters=INPUT_SCHEMA, kind="custom", namespace="functions"),
    Tool("spawn", parameters={"type": "object"}, namespace="agents"),
    Tool("patch", parameters=INPUT_SCHEMA, kind="custom"),
]
_validate = TypeAdapter(ResponseStreamEvent).validate_python


def request(**fields: Any) -> ChatRequest:
    return ChatRequest("gpt-of-today", [Message("user", [TextPart("hi")])], **({"tools": TOOLS} | fields))


def call(index: int, name: str | None, arguments: str) -> Delta:
    return Delta(tool_calls=[ToolCallDelta(index, name, arguments)])


def kinds(wire: bytes) -> list[str]:
    return [e["type"].removeprefix("response.") for e in events(wire)]


def output(wire: bytes) -> list[dict[str, Any]]:
    return events(wire)[-1]["response"]["output"]


# --- the order of events --------------------------------------------------------------------------------


def test_text():
    wire = stream_of(request(), [Delta("Hel"), Delta("lo"), Delta(token_ids=[1])])
    assert kinds(wire) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    item = {
        "id": minted("msg", CALL, 0),
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert output(wire) == [item]
    assert [e["delta"] for e in events(wire) if "delta" in e] == ["Hel", "lo"]


def test_shown_reasoning_then_text():
    wire = stream_of(request(), [Delta(reasoning="be"), Delta(reasoning="cause"), Delta("so")])
    assert kinds(wire)[2:9] == [
        "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.delta", "reasoning_summary_text.done", "reasoning_summary_part.done",
        "output_item.done",
    ]  # fmt: skip
    thought, said = output(wire)
    assert thought["summary"] == [{"type": "summary_text", "text": "because"}]
    assert thought["id"] == minted("rs", CALL, 0) and said["id"] == minted("msg", CALL, 1)
    sealed = unseal(thought["encrypted_content"])
    assert sealed is not None and (sealed.call_id, sealed.text) == (CALL, "because")


def test_hidden_reasoning_is_only_sealed():
    wire = stream_of(request(show_reasoning=False), [Delta(reasoning="secret"), Delta("so")])
    assert b"secret" not in wire and "reasoning_summary_text.delta" not in kinds(wire)
    thought = output(wire)[0]
    assert thought["summary"] == []
    sealed = unseal(thought["encrypted_content"])
    assert sealed is not None and sealed.text == "secret"
    added = next(e for e in events(wire) if e["type"] == "response.output_item.added")
    assert added["item"]["encrypted_content"]


def test_function_calls_in_parallel():
    deltas = [call(0, "bash", '{"a'), call(0, None, '":1}'), call(1, "agents__spawn", "{}")]
    wire = stream_of(request(), deltas)
    assert kinds(wire)[2:] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    first, second = output(wire)
    assert first == {
        "id": minted("fc", CALL, 0),
        "type": "function_call",
        "call_id": minted("call", CALL, 0),
        "name": "bash",
        "status": "completed",
        "arguments": '{"a":1}',
    }
    assert (second["name"], second["namespace"], second["call_id"]) == (
        "spawn",
        "agents",
        minted("call", CALL, 1),
    )


def test_custom_calls_stream_their_unwrapped_input():
    deltas = [
        call(0, "exec", '{"input": "te'),
        call(0, None, "xt(\\"),
        call(0, None, 'n1)"}'),
        call(1, "patch", "raw"),
    ]
    wire = stream_of(request(), deltas)
    assert [e["delta"] for e in events(wire) if e["type"] == "response.custom_tool_call_input.delta"] == [
        "te", "xt(", "\n1)", "raw",
    ]  # fmt: skip
    assert output(wire) == [
        {
            "id": minted("ctc", CALL, 0),
            "type": "custom_tool_call",
            "call_id": minted("call", CALL, 0),
            "name": "exec",
            "namespace": "functions",
            "status": "completed",
            "input": "text(\n1)",
        },
        {
            "id": minted("ctc", CALL, 1),
            "type": "custom_tool_call",
            "call_id": minted("call", CALL, 1),
            "name": "patch",
            "status": "completed",
            "input": "raw",
        },
    ]


def test_custom_input_that_is_settled_only_at_the_end_is_still_streamed():
    wire = stream_of(request(), [call(0, "patch", '{"x": 1, "input": "late"}')])
    deltas = [e["delta"] for e in events(wire) if e["type"] == "response.custom_tool_call_input.delta"]
    assert deltas == ["late"] and output(wire)[0]["input"] == "late"


def test_a_tool_nobody_offered_is_passed_on_as_a_function():
    assert output(stream_of(request(), [call(0, "made__up", "{}")]))[0]["name"] == "made__up"


def test_interleaved_calls_lose_nothing():
    deltas = [
        call(0, "bash", '{"a":'),
        call(1, "exec", '{"input":"x'),
        call(0, None, "1}"),
        call(1, None, 'y"}'),
    ]
    first, second = output(stream_of(request(), deltas))
    assert (first["arguments"], second["input"]) == ('{"a":1}', "xy")


def test_white_space_around_calls_is_no_message():
    deltas = [Delta(reasoning="r"), Delta("\n\n"), call(0, "bash", "{}"), Delta("\n"), call(1, "bash", "{}")]
    assert [i["type"] for i in output(stream_of(request(), deltas))] == [
        "reasoning", "function_call", "function_call",
    ]  # fmt: skip


def test_white_space_before_text_is_kept():
    assert (
        output(stream_of(request(), [Delta("\n\n"), Delta(" "), Delta("hi")]))[0]["content"][0]["text"]
        == "\n\n hi"
    )
    assert output(stream_of(request(), [Delta("\n")]))[0]["content"][0]["text"] == "\n"


def test_an_empty_answer_is_an_empty_message():
    assert output(stream_of(request(), []))[0]["content"][0]["text"] == ""


# --- ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "why"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_cut_off_text(reason: Any, why: str):
    wire = stream_of(request(), [Delta(reasoning="r"), Delta("half")], finish_reason=reason)
    last = events(wire)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": why}
    assert [i.get("status") for i in last["response"]["output"]] == [None, "incomplete"]


@pytest.mark.parametrize(
    ("name", "whole", "half"), [("bash", '{"a":1}', '{"a":'), ("exec", '{"input":"ls"}', '{"input":"rm -r /')]
)
def test_a_cut_off_call_is_never_done(name: str, whole: str, half: str):
    wire = stream_of(request(), [call(0, name, whole), call(1, name, half)], finish_reason="length")
    done = [e["output_index"] for e in events(wire) if e["type"] == "response.output_item.done"]
    assert done == [0]
    assert [i["status"] for i in output(wire)] == ["completed", "incomplete"]


def test_an_aborted_answer_fails():
    wire = stream_of(request(), [Delta("half")], finish_reason="abort")
    assert events(wire)[-1]["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("overloaded", "rate_limit_exceeded", "Please try again in 7s."),
        ("upstream", "server_error", "why"),
        ("internal", "server_error", "why"),
        ("bad_request", "invalid_prompt", "why"),
        ("too_large", "invalid_prompt", "why"),
        ("context_overflow", "context_length_exceeded", "exceeds the context window"),
    ],
)
def test_errors_in_a_stream(kind: ErrorKind, code: str, words: str):
    encoder = DIALECT.encoder(request(), CALL, CREATED)
    wire = encoder.start() + encoder.delta(Delta(reasoning="done")) + encoder.delta(Delta("half"))
    wire += encoder.error(PolarError(kind, "why", retry_after_s=7))
    last = events(wire)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == code and words in last["response"]["error"]["message"]
    assert [i["type"] for i in last["response"]["output"]] == ["reasoning"], "what was not done is not listed"
    seen = list(streaming(wire).responses.create(model="m", input="hi", stream=True))
    assert seen[-1].type == "response.failed"


def test_keepalive_sends_nothing():
    assert DIALECT.encoder(request(), CALL, CREATED).keepalive() == b""


def test_logprobs_are_of_the_message():
    one, two = (
        TokenLogprob(t, p, top=[TokenLogprob("x", -1.0)]) for t, p in (("He", -0.5), ("y", -math.inf))
    )
    deltas = [
        Delta(reasoning="Hm"), Delta("He", shown_logprobs=[one]), Delta("y", shown_logprobs=[two]),
        call(0, "bash", "{}"),
    ]  # fmt: skip
    asked = request(top_logprobs=1)
    wire = stream_of(asked, deltas)
    seen, final = rebuilt(wire)
    given = [[t.token for t in e.logprobs] for e in seen if e.type == "response.output_text.delta"]
    assert given == [["He"], ["y"]]
    (done,) = (e for e in seen if e.type == "response.output_text.done")
    (message,) = (item for item in final.output if item.type == "message")
    for shown in (done.logprobs, message.content[0].logprobs):
        assert [(t.token, t.logprob, len(t.top_logprobs)) for t in shown] == [
            ("He", -0.5, 1),
            ("y", -9999.0, 1),
        ]
    whole = json.loads(DIALECT.encode(asked, completion_of(asked, deltas), CALL, CREATED).body)
    assert whole["output"] == output(wire)


# --- the response object --------------------------------------------------------------------------------


def test_the_response_object_echoes_the_request_and_the_usage():
    asked = request(
        sampling=Sampling(0.5, 0.9, max_tokens=50),
        tool_choice=ToolChoice("tool", "agents__spawn"),
        parallel_tool_calls=False,
    )
    usage = Usage(100, 20, 30, 5)
    response = events(stream_of(asked, [Delta("x")], usage=usage))[-1]["response"]
    assert (response["id"], response["created_at"]) == (minted("resp", CALL), 1732100000)
    assert (response["model"], response["status"]) == ("gpt-of-today", "completed")
    assert (response["temperature"], response["top_p"], response["max_output_tokens"]) == (0.5, 0.9, 50)
    assert response["tool_choice"] == {"type": "function", "name": "spawn"}
    assert response["parallel_tool_calls"] is False
    assert response["usage"] == {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 0},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 120,
    }
    started = events(stream_of(asked, []))[0]["response"]
    assert (started["status"], started["usage"], started["output"]) == ("in_progress", None, [])
    Response.model_validate(response)


@pytest.mark.parametrize("stream", [True, False])
def test_the_response_object_echoes_what_is_short(stream: bool):
    given = {
        "metadata": {"run": "7"},
        "truncation": "auto",
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "service_tier": "flex",
        "reasoning": {"effort": "low", "summary": "auto"},
        "store": False,
    }
    body = {"model": "m", "input": "hi", "instructions": "long", **given}
    asked = DIALECT.decode(json.dumps(body).encode(), {}, "")
    if stream:
        first, *_, last = (e["response"] for e in events(stream_of(asked, [Delta("x")])) if "response" in e)
    else:
        last = json.loads(DIALECT.encode(asked, completion_of(asked, [Delta("x")]), CALL, CREATED).body)
        first = last
    assert {name: first[name] for name in given} == {name: last[name] for name in given} == given
    assert (last["instructions"], last["tools"], last["previous_response_id"]) == (None, [], None)
    Response.model_validate(last)


@pytest.mark.parametrize("fields", [{}, {"store": None}, {"store": True}])
def test_what_the_service_does_where_nothing_is_said(fields: dict[str, Any]):
    asked = DIALECT.decode(json.dumps({"model": "m", "input": "hi", **fields}).encode(), {}, "")
    response = events(stream_of(asked, []))[-1]["response"]
    assert response["store"] is True and response["metadata"] == {}
    assert response["truncation"] == "disabled" and response["reasoning"] == {"effort": None, "summary": None}


def test_usage_counts_ids_where_the_engine_counts_nothing():
    wire = stream_of(request(), [Delta("x")], prompt_token_ids=[1, 2, 3], completion_token_ids=[4])
    assert events(wire)[-1]["response"]["usage"]["total_tokens"] == 4


# --- compaction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize(
    "deltas",
    [
        [Delta(reasoning="hm"), Delta(" We did"), Delta(" half. ")],
        [Delta(reasoning="We did half.")],
        [Delta("We did half."), call(0, "bash", "{}")],
    ],
)
def test_compaction_is_exactly_one_sealed_item(deltas: list[Delta], reason: Any):
    asked = request(notes=["mapped:compaction_trigger"])
    wire = stream_of(asked, deltas, finish_reason=reason)
    assert kinds(wire) == ["created", "in_progress", "output_item.added", "output_item.done", "completed"]
    (item,) = output(wire)
    assert item["type"] == "compaction"
    sealed = unseal(item["encrypted_content"])
    assert sealed is not None and (sealed.call_id, sealed.text) == (CALL, "We did half.")
    _, final = rebuilt(wire)
    assert [i.to_dict() for i in final.output] == [item]
    whole = DIALECT.encode(asked, completion_of(asked, deltas, finish_reason=reason), CALL, CREATED)
    assert json.loads(whole.body)["output"] == [item]


def test_a_summary_comes_back_with_the_next_request():
    item = output(stream_of(request(notes=["mapped:compaction_trigger"]), [Delta("We did half.")]))[0]
    body = json.dumps({"model": "m", "input": [item, {"role": "user", "content": "go on"}]})
    assert "We did half." in DIALECT.decode(body.encode(), {}, "/v1/responses").messages[0].text


# --- properties -----------------------------------------------------------------------------------------

_text = st.text(st.characters(codec="utf-8"), max_size=20)
_words = _text | st.sampled_from(["", " ", "\n\n", "Hello"])
_arguments = st.one_of(
    _text.map(lambda t: json.dumps({"input": t})),
    _text.map(lambda t: json.dumps({"input": t}, ensure_ascii=False)),
    st.sampled_from(["", "{}", '{"input": "cut', "plain"]),
    _text,
)
_calls = st.lists(
    st.tuples(st.sampled_from(["bash", "exec", "agents__spawn", "patch", "unknown"]), _arguments), max_size=3
)
_reasons = st.sampled_from(["stop", "tool_calls", "length"])


@st.composite
def _answers(draw: st.DrawFn) -> tuple[list[Delta], list[Delta]]:
    """One answer, in the order in which engines give its parts, whole and split."""

    def split(text: str) -> list[str]:
        at = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
        return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]

    reasoning, text, calls = draw(_words), draw(_words), draw(_calls)
    whole = [Delta(text, reasoning, [ToolCallDelta(i, n, a) for i, (n, a) in enumerate(calls)])]
    pieces = [Delta(reasoning=r) for r in split(reasoning)] + [Delta(t) for t in split(text)]
    for index, (name, arguments) in enumerate(calls):
        parts = split(arguments)
        pieces += [call(index, name, parts[0]), *(call(index, None, p) for p in parts[1:])]
    return whole, pieces


@given(_answers(), st.booleans(), _reasons)
def test_any_split_gives_the_answer_that_is_given_without_a_stream(
    answer: tuple[list[Delta], list[Delta]], shown: bool, reason: Any
):
    whole, pieces = answer
    asked = request(show_reasoning=shown)
    usage = Usage(3, 2)
    wire = stream_of(asked, pieces, finish_reason=reason, usage=usage)
    last = events(wire)[-1]["response"]
    assert last == events(stream_of(asked, whole, finish_reason=reason, usage=usage))[-1]["response"]
    reply = DIALECT.encode(
        asked, completion_of(asked, pieces, finish_reason=reason, usage=usage), CALL, CREATED
    )
    assert reply.status == 200 and json.loads(reply.body) == last
    for event in events(wire):
        _validate(event)


@given(_answers(), st.booleans())
def test_the_sdk_rebuilds_what_we_emitted(answer: tuple[list[Delta], list[Delta]], shown: bool):
    wire = stream_of(request(show_reasoning=shown), answer[1])
    want = output(wire)
    seen, final = rebuilt(wire)
    assert [_plain(i.to_dict()) for i in final.output] == want
    for index, item in enumerate(want):
        mine = [e for e in seen if getattr(e, "output_index", None) == index]
        snapshots = [e.snapshot for e in mine if hasattr(e, "snapshot")]
        deltas = "".join(e.delta for e in mine if e.type.endswith(".delta"))
        if item["type"] == "message":
            assert deltas == item["content"][0]["text"] == (snapshots[-1] if snapshots else "")
        elif item["type"] == "function_call":
            assert deltas == item["arguments"] == (snapshots[-1] if snapshots else "")
        elif item["type"] == "custom_tool_call":
            assert deltas == item["input"]
        else:
            assert deltas == "".join(s["text"] for s in item["summary"])


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    """An item without what the SDK's parser adds to it."""
    item.pop("parsed_arguments", None)
    for part in item.get("content") or []:
        part.pop("parsed", None)
    return item


@given(_answers())
def test_items_that_are_done_are_the_response(answer: tuple[list[Delta], list[Delta]]):
    """Codex and the AI SDK read the items that are done, not the final response."""
    wire = stream_of(request(), answer[1])
    seen = streaming(wire).responses.create(model="m", input="hi", stream=True)
    done = {e.output_index: e.item.to_dict() for e in seen if e.type == "response.output_item.done"}
    assert [done[index] for index in sorted(done)] == output(wire)


_any_delta = st.builds(
    Delta,
    text=_words,
    reasoning=_words,
    tool_calls=st.lists(
        st.builds(ToolCallDelta, st.integers(0, 2), st.sampled_from(["bash", "exec"]), _arguments), max_size=2
    ),
)


@given(st.lists(_any_delta, max_size=8))
def test_any_interleaving_keeps_every_word(deltas: list[Delta]):
    wire = stream_of(request(), deltas)
    _, final = rebuilt(wire)
    items = [i.to_dict() for i in final.output]
    done = completion_of(request(), deltas).message
    said = "".join(i["content"][0]["text"] for i in items if i["type"] == "message")
    thought = "".join(i["summary"][0]["text"] for i in items if i["type"] == "reasoning")
    assert said.rstrip() == done.text.rstrip() or not done.text.strip()
    assert thought == (done.reasoning or "")
    calls = {i["call_id"]: i for i in items if i["type"].endswith("_call")}
    assert len(calls) == len(done.tool_calls)
    for want in done.tool_calls:
        item = calls[want.id]
        if want.kind == "custom":
            assert item["input"] == unwrap(want.arguments)
        else:
            assert item["arguments"] == want.arguments


@given(_answers())
def test_history_that_comes_back_is_what_was_sampled(answer: tuple[list[Delta], list[Delta]]):
    asked = request(show_reasoning=False)
    done = completion_of(asked, answer[1]).message
    items = output(stream_of(asked, answer[1]))
    body = json.dumps({"model": "m", "input": [{"role": "user", "content": "hi"}, *items]})
    turn = DIALECT.decode(body.encode(), {}, "/v1/responses").messages[1]
    assert turn.reasoning == done.reasoning
    assert turn.text == ("" if done.tool_calls and not done.text.strip() else done.text)
    assert [(c.id, c.name, c.namespace, c.kind) for c in turn.tool_calls] == [
        (c.id, c.name, c.namespace, c.kind) for c in done.tool_calls
    ]
    assert [c.arguments for c in turn.tool_calls] == [
        unwrap(c.arguments) if c.kind == "custom" else c.arguments for c in done.tool_calls
    ]
    assert all(CALL in i for i in turn.minted_ids) and turn.minted_ids


# --- whole answers --------------------------------------------------------------------------------------


def test_the_sdk_reads_a_whole_answer():
    deltas = [Delta(reasoning="why"), Delta("so"), call(0, "bash", "{}")]
    reply = DIALECT.encode(request(), completion_of(request(), deltas), CALL, CREATED)
    response = client(reply).responses.create(model="m", input="hi")
    assert response.output_text == "so"
    assert [i.type for i in response.output] == ["reasoning", "message", "function_call"]
    assert response._request_id == minted("req", CALL)


def test_an_aborted_whole_answer_is_an_error():
    reply = DIALECT.encode(request(), completion_of(request(), [], finish_reason="abort"), CALL, CREATED)
    assert reply.status == 500 and json.loads(reply.body)["error"]["code"] == "server_error"
