"""One request for several answers: one stream, and for each answer ids, logprobs and a record of its own."""

from __future__ import annotations

import json
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.asking import UpstreamRequest
from polar_mitm.config import Settings
from polar_mitm.conformance.scripts import Answer
from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.ids import minted, sibling
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.errors import PolarError
from polar_mitm.exchange import Exchange
from polar_mitm.gathered import shares
from polar_mitm.lineage import Lineage, asked
from polar_mitm.types import ModelCall, Usage, Wire
from polar_mitm.upstream.engine import EngineInfo
from tests.support.engine_bytes import PROMPT_IDS, events, sampled, split

ENGINE = EngineInfo("http://engine", "tiny", max_model_len=4096, policy_version="tiny@7")
CALL_ID = "01JD0Z6Q3WAAAAAAAAAAAAAAAZ"
IDS = [sibling(CALL_ID, k) for k in range(3)]
TOOL = {
    "type": "function",
    "function": {"name": "Bash", "description": "run", "parameters": {"type": "object"}},
}
ASK: dict[str, Any] = {"model": "gpt-x", "messages": [{"role": "user", "content": "go"}], "tools": [TOOL]}
MANY = Answer(
    text="one",
    tokens_per_chunk=2,
    others=[Answer(text="the second", reasoning="hm"), Answer(tool_calls=[("Bash", '{"command": "ls"}')])],
)
EVERY = [MANY, *MANY.others]


def new(settings: Settings | None = None, **options: Any) -> Exchange:
    given: dict[str, Any] = {"rollout_id": "r1", "seq": 3, "call_id": CALL_ID, "clock": lambda: 1000.0}
    return Exchange(DIALECTS["openai_chat"], ENGINE, settings or Settings(), **(given | options))


def start(exchange: Exchange, *, stream: bool = True, **fields: Any) -> Any:
    body = json.dumps(ASK | {"stream": stream, "n": 3} | fields).encode()
    return exchange.start(Wire("POST", "host", "/v1/chat/completions", [("a", "b")], body), {})


def begun(*, stream: bool = True, fields: dict[str, Any] | None = None, **options: Any) -> Exchange:
    exchange = new(**options)
    assert isinstance(start(exchange, stream=stream, **(fields or {})), UpstreamRequest)
    if stream:
        exchange.open()
    return exchange


def the_end(exchange: Exchange) -> bytes:
    end = exchange.finish()
    return end.body if isinstance(end, Reply) else end


def data_of(stream: bytes) -> list[dict[str, Any]]:
    lines = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


# --- asked, and answered --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_each_answer_is_a_record_of_its_own(stream: bool) -> None:
    exchange = begun(stream=stream)
    out = b"".join(map(exchange.feed, events(MANY, n=3))) + the_end(exchange)
    calls = exchange.records(delivered=True)
    assert [c.call_id for c in calls] == IDS and len(set(IDS)) == 3
    for number, (call, answer) in enumerate(zip(calls, EVERY, strict=True)):
        tokens = sampled(answer)
        assert call.prompt_token_ids == PROMPT_IDS
        assert call.completion_token_ids == [t.token_id for t in tokens]
        assert call.behaviour_logprobs == [t.logprob for t in tokens]
        assert call.usage == Usage(len(PROMPT_IDS), len(tokens))
        assert (call.status, call.delivered, call.seq, call.rollout_id) == ("ok", True, 3, "r1")
        assert call.finish_reason == ("tool_calls" if number == 2 else "stop")
        assert call.answer is not None and call.answer.text == answer.text
        assert (call.answer.reasoning or "") == answer.reasoning
        assert call.route == "POST /v1/chat/completions" and call.upstream_body
        assert (call.first_token_at, call.ended_at, call.policy_version) == (1000.0, 1000.0, "tiny@7")
    first, *others = calls
    assert first.wire.response_body == out and first.answer_of is None and first.notes == []
    assert all(c.wire == Wire() and c.answer_of == CALL_ID for c in others)
    assert exchange.records(delivered=True)[0] is first
    (used,) = cast(Any, calls[2].answer).tool_calls
    assert used.id == minted("call", IDS[2], 0) and used.id.encode() in out


def test_the_client_gets_every_answer_by_its_index() -> None:
    whole = begun(stream=False)
    for event in events(MANY, n=3):
        whole.feed(event)
    body = json.loads(the_end(whole))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] or "" for choice in body["choices"]] == [a.text for a in EVERY]
    streamed = begun()
    chunks = data_of(b"".join(map(streamed.feed, events(MANY, n=3))) + the_end(streamed))
    for number, answer in enumerate(EVERY):
        deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == number]
        assert "".join(delta.get("content") or "" for delta in deltas) == answer.text
    total = sum(len(sampled(answer)) for answer in EVERY)
    assert body["usage"]["completion_tokens"] == total


@given(st.lists(st.integers(0, 100_000), max_size=20), st.booleans())
def test_any_split_gives_the_same_bytes_and_records(cuts: list[int], stream: bool) -> None:
    def run(chunks: list[bytes]) -> tuple[bytes, Any]:
        exchange = begun(stream=stream)
        out = b"".join(map(exchange.feed, chunks)) + the_end(exchange)
        calls = exchange.records(delivered=True)
        calls[0].wire.chunk_sizes, calls[0].wire.chunk_at_ms = [], []
        return out, msgspec.to_builtins(calls, enc_hook=list)

    data = b"".join(events(MANY, n=3))
    assert run(split(data, cuts)) == run([data])


def test_weights_that_change_meanwhile_are_told_of_each_answer() -> None:
    now = ["step-1"]
    exchange = begun(policy_version=lambda: now[0])
    one = Answer(text="a", tokens_per_chunk=9)
    stream = events(one, n=3)  # three heads, three answers of one chunk, usage, done
    for event, now[0] in zip(stream, ["step-1"] * 4 + ["step-2"] * 4, strict=True):
        exchange.feed(event)
    the_end(exchange)
    assert [c.policy_version for c in exchange.records(delivered=True)] == ["step-1", "step-2", "step-2"]


# --- limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "most", "fine"), [(16, 16, True), (17, 16, False), (2, 1, False), (1, 1, True)]
)
def test_more_answers_than_are_given_are_a_bad_request(n: int, most: int, fine: bool) -> None:
    exchange = new(Settings(max_answers=most))
    step = start(exchange, n=n)
    assert isinstance(step, UpstreamRequest) == fine
    if fine:
        assert json.loads(step.body).get("n", 1) == n
    else:
        assert step.status == 400 and f"n: {n} answers" in json.loads(step.body)["error"]["message"]
        (call,) = exchange.records(delivered=True)
        assert (call.status, call.upstream_body) == ("refused", b"")


# --- answers that do not come to their end --------------------------------------------------------------


def half() -> list[bytes]:
    """The first answer is whole, and of the two others four tokens have come."""
    stream = events(Answer(text="one", tokens_per_chunk=4, others=EVERY[1:]), n=3)
    return stream[:6]


def check_half(calls: list[ModelCall]) -> None:
    assert [len(c.completion_token_ids) for c in calls] == [4, 4, 4]
    assert [c.finish_reason for c in calls] == ["stop", None, None]
    for call, answer in zip(calls, EVERY, strict=True):
        assert call.completion_token_ids == [t.token_id for t in sampled(answer)][:4]
        assert call.behaviour_logprobs == [t.logprob for t in sampled(answer)][:4]
        assert call.prompt_token_ids == PROMPT_IDS


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_keeps_what_each_answer_had(stream: bool) -> None:
    exchange = begun(stream=stream)
    for event in half():
        exchange.feed(event)
    exchange.cancel()
    calls = exchange.records(delivered=False)
    check_half(calls)
    assert {(c.status, c.delivered, c.error) for c in calls} == {("cancelled", False, "the harness hung up")}
    assert [c.answer.text for c in calls if c.answer] == ["one", "", ""]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["cut", "event", "connection", "done too early"])
def test_a_broken_engine_fails_all_and_keeps_what_each_had(stream: bool, how: str) -> None:
    exchange = begun(stream=stream)
    for event in half():
        exchange.feed(event)
    if how == "event":
        exchange.feed(b'data: {"error": {"message": "out of memory"}}\n\n')
    if how == "done too early":
        exchange.feed(b"data: [DONE]\n\n")
    end = exchange.fail(PolarError("upstream", "gone")) if how == "connection" else exchange.finish()
    assert isinstance(end, bytes) == stream
    calls = exchange.records(delivered=True)
    check_half(calls)
    assert {c.status for c in calls} == {"failed"} and len({c.error for c in calls}) == 1
    assert not any(c.delivered for c in calls)


@given(
    at=st.integers(0, 100_000), cut=st.integers(0, 300), fault=st.binary(max_size=20), stream=st.booleans()
)
def test_whatever_an_engine_sends_each_answer_has_a_record(
    at: int, cut: int, fault: bytes, stream: bool
) -> None:
    data = b"".join(events(MANY, n=3))
    at %= len(data)
    exchange = begun(stream=stream)
    exchange.feed(data[:at] + fault + data[at + cut :])
    exchange.finish()
    calls = exchange.records(delivered=True)
    assert [c.call_id for c in calls] == IDS and len({c.status for c in calls}) == 1
    assert exchange.ended and calls[0].status in ("ok", "failed")
    if calls[0].status == "ok":
        assert all(c.answer is not None and c.finish_reason for c in calls)


# --- usage ----------------------------------------------------------------------------------------------


def test_a_count_for_all_answers_is_shared_by_their_own_tokens() -> None:
    assert shares(Usage(9, 12, 3, 5), [12]) == [Usage(9, 12, 3, 5)]
    assert shares(Usage(9, 12, 3), [5, 7]) == [Usage(9, 5, 3), Usage(9, 7, 3)]
    assert shares(Usage(), [5, 7]) == [Usage(), Usage()]  # an engine that counts nothing


@pytest.mark.parametrize("total", [1, 11, 13, 24])
def test_what_does_not_add_up_passes_for_nobodys(total: int) -> None:
    told = [usage.completion_tokens for usage in shares(Usage(9, total), [5, 7])]
    assert all(number not in (0, own) for number, own in zip(told, [5, 7], strict=True))


# --- later calls ----------------------------------------------------------------------------------------


def echo(call: ModelCall) -> dict[str, Any]:
    answer = cast(Any, call.answer)
    used = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in answer.tool_calls
    ]
    return {"role": "assistant", "content": answer.text or None, **({"tool_calls": used} if used else {})}


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("restored", [False, True])
def test_a_later_call_may_continue_any_of_them(number: int, restored: bool) -> None:
    lineage = Lineage()
    exchange = begun(stream=False, lineage=lineage)
    for event in events(MANY, n=3):
        exchange.feed(event)
    the_end(exchange)
    calls = exchange.records(delivered=True)
    if restored:
        lineage = Lineage()
        lineage.restore(asked(calls), "")
    after = [echo(calls[number])]
    after += [
        {"role": "tool", "tool_call_id": c["id"], "content": "ok"} for c in after[0].get("tool_calls", [])
    ]
    then = Exchange(
        DIALECTS["openai_chat"], ENGINE, Settings(continuation=False), rollout_id="r1", seq=4, lineage=lineage
    )
    start(then, messages=[*ASK["messages"], *after, {"role": "user", "content": "more"}], n=1)
    assert (then.call.parent_call_id, then.call.fallback) == (IDS[number], "continuation_off")


# --- what a client is shown, and what shapes it ---------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_are_shown_to_who_asks_and_recorded_as_ever(stream: bool) -> None:
    def run(**fields: Any) -> tuple[list[Any], ModelCall]:
        exchange = begun(stream=stream, fields={"n": 1, **fields})
        top = json.loads(exchange.call.upstream_body)["top_logprobs"]
        out = b"".join(map(exchange.feed, events(Answer(text="Hé"), top_logprobs=top))) + the_end(exchange)
        choices = [c for chunk in (data_of(out) if stream else [json.loads(out)]) for c in chunk["choices"]]
        shown = [p for c in choices for p in (c.get("logprobs") or {}).get("content") or []]
        return shown, exchange.records(delivered=True)[0]

    plain, call = run()
    assert plain == [] and call.behaviour_logprobs == [t.logprob for t in sampled(Answer(text="Hé"))]
    shown, asked_call = run(logprobs=True, top_logprobs=2)
    assert asked_call.behaviour_logprobs == call.behaviour_logprobs
    assert asked_call.completion_token_ids == call.completion_token_ids
    assert [p["logprob"] for p in shown] == call.behaviour_logprobs
    assert all(len(p["top_logprobs"]) == 2 for p in shown)


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        (
            {
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
                "tools": [],
            },
            "guided:json_schema",
        ),
        ({"tool_choice": "required"}, "guided:tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "Bash"}}}, "guided:tool_choice"),
    ],
)
def test_a_call_under_a_grammar_says_so(fields: dict[str, Any], note: str) -> None:
    exchange = new()
    start(exchange, **fields)
    assert note in exchange.call.notes and exchange.call.guided
    free = new()
    start(free)
    assert not free.call.guided


ANY = {"type": "object"}
FORMAT = {"type": "json_schema", "name": "a", "schema": ANY}


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        ("anthropic", {"max_tokens": 9, "output_config": {"format": {"type": "json_schema", "schema": ANY}}}),
        ("openai_responses", {"text": {"format": FORMAT}}),
        ("openai_chat", {"response_format": {"type": "json_schema", "json_schema": FORMAT}}),
        ("openai_chat", {"response_format": {"type": "json_object"}}),
    ],
)
def test_structured_output_of_every_dialect_is_guided(dialect: str, fields: dict[str, Any]) -> None:
    said = {"input": "go"} if dialect == "openai_responses" else {"messages": ASK["messages"]}
    exchange = Exchange(DIALECTS[dialect], ENGINE, Settings(), rollout_id="r", seq=0)
    step = exchange.start(
        Wire("POST", "h", "/", [], json.dumps({"model": "m", **said, **fields}).encode()), {}
    )
    assert isinstance(step, UpstreamRequest)
    assert json.loads(step.body)["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert exchange.call.notes == ["guided:json_schema"]
