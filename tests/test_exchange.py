"""One call as a machine: what any split, fault, or hang-up makes of it, in several dialects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.asking import UpstreamRequest
from polar_mitm.config import Settings
from polar_mitm.conformance.scripts import Answer
from polar_mitm.dialects.base import Dialect, Reply
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.errors import PolarError
from polar_mitm.exchange import Exchange
from polar_mitm.types import ModelCall, Sampling, Wire
from polar_mitm.upstream.engine import EngineInfo
from tests.support.engine_bytes import PROMPT_IDS, events, sampled, split

ENGINE = EngineInfo("http://engine", "tiny", max_model_len=4096, policy_version="tiny@7")
CALL_ID = "01JD0Z6Q3WAAAAAAAAAAAAAAAA"
SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}


@dataclass(frozen=True)
class Provider:
    """What the tests need to know of a dialect."""

    name: str
    path: str
    last_event: bytes
    error_event: bytes
    overloaded: int
    max_tokens: str
    keepalive: bytes

    def body(self, *, stream: bool = True, **fields: Any) -> bytes:
        if self.name == "anthropic":
            tools: list[Any] = [{"name": "Bash", "description": "run", "input_schema": SCHEMA}]
            base: dict[str, Any] = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 100}
        elif self.name == "openai_chat":
            function = {"name": "Bash", "description": "run", "parameters": SCHEMA}
            tools = [{"type": "function", "function": function}]
            base = {"messages": [{"role": "user", "content": "go"}]}
        else:
            tools = [{"type": "function", "name": "Bash", "description": "run", "parameters": SCHEMA}]
            base = {"input": "go"}
        return json.dumps({"model": "claimed", "tools": tools, "stream": stream, **base, **fields}).encode()


ANTHROPIC = Provider(
    "anthropic", "/v1/messages?beta=true", b"event: message_stop\n", b"event: error\n", 529, "max_tokens",
    b'event: ping\ndata: {"type":"ping"}\n\n',
)  # fmt: skip
OPENAI = Provider(
    "openai_responses",
    "/v1/responses",
    b"event: response.completed\n",
    b"event: response.failed\n",
    503,
    "max_output_tokens",
    b"",
)
CHAT = Provider(
    "openai_chat", "/v1/chat/completions", b"data: [DONE]\n", b'data: {"error":', 503,
    "max_completion_tokens", b": keepalive\n\n",
)  # fmt: skip
each = pytest.mark.parametrize("provider", [ANTHROPIC, OPENAI, CHAT], ids=lambda p: p.name)


def ticking() -> Iterator[float]:
    now = 1000.0
    while True:
        yield now
        now += 1


def new(
    provider: Provider, settings: Settings | None = None, dialect: Any = None, clock: Any = lambda: 1000.0
) -> Exchange:
    return Exchange(
        cast(Dialect, dialect) or DIALECTS[provider.name],
        ENGINE,
        settings or Settings(),
        rollout_id="r1",
        seq=3,
        call_id=CALL_ID,
        clock=clock,
    )


def start(exchange: Exchange, provider: Provider, body: bytes) -> UpstreamRequest | Reply:
    wire = Wire("POST", "host", provider.path, [("a", "b")], body)
    return exchange.start(wire, {"content-type": "application/json"})


def begun(provider: Provider, *, stream: bool = True, released: bool = True, **kwargs: Any) -> Exchange:
    exchange = new(provider, **kwargs)
    assert isinstance(start(exchange, provider, provider.body(stream=stream)), UpstreamRequest)
    if stream and released:
        exchange.open()
    return exchange


def the_end(exchange: Exchange) -> bytes:
    """The answer's last bytes, and the reply's whole body where it is one."""
    end = exchange.finish()
    return end.body if isinstance(end, Reply) else end


def whole(provider: Provider, chunks: list[bytes], *, stream: bool = True) -> tuple[bytes, Any]:
    """All bytes that a harness gets, and the record without the pacing, which is the split's own."""
    exchange = begun(provider, stream=stream)
    out = b"".join(map(exchange.feed, chunks)) + the_end(exchange)
    call = exchange.records(delivered=True)[0]
    assert sum(call.wire.chunk_sizes) == len(call.wire.response_body) == len(out)
    assert len(call.wire.chunk_at_ms) == len(call.wire.chunk_sizes)
    assert call.wire.response_body == out
    call.wire.chunk_sizes, call.wire.chunk_at_ms = [], []
    return out, msgspec.to_builtins(call, enc_hook=list)


answers = st.builds(
    Answer,
    text=st.text(max_size=30),
    reasoning=st.text(max_size=20),
    tool_calls=st.lists(st.tuples(st.just("Bash"), st.just('{"command": "ls é"}')), max_size=2),
    tokens_per_chunk=st.integers(1, 7),
    finish_reason=st.sampled_from([None, "length", "content_filter", "abort"]),
)
cuts = st.lists(st.integers(0, 100_000), max_size=20)


@each
@pytest.mark.parametrize("stream", [True, False])
@given(answer=answers, cuts=cuts)
def test_any_split_gives_the_same_bytes_and_record(
    provider: Provider, stream: bool, answer: Answer, cuts: list[int]
) -> None:
    data = b"".join(events(answer))
    assert whole(provider, split(data, cuts), stream=stream) == whole(provider, [data], stream=stream)


@each
@pytest.mark.parametrize("stream", [True, False])
@given(answer=answers, at=st.integers(0, 100_000), fault=st.binary(max_size=20), cuts=cuts)
def test_any_split_of_a_broken_stream_too(
    provider: Provider, stream: bool, answer: Answer, at: int, fault: bytes, cuts: list[int]
) -> None:
    data = b"".join(events(answer))
    at %= len(data)
    for broken in (data[:at], data[:at] + fault + data[at:], data[:at] + b"\n\ndata: " + fault + b"\n\n"):
        assert whole(provider, split(broken, cuts), stream=stream) == whole(provider, [broken], stream=stream)


@each
@pytest.mark.parametrize("stream", [True, False])
@given(chunks=st.lists(st.binary(max_size=40)))
def test_feed_and_finish_raise_for_no_bytes_at_all(
    provider: Provider, stream: bool, chunks: list[bytes]
) -> None:
    for released in (True, False):
        exchange = begun(provider, stream=stream, released=released)
        for chunk in chunks:
            exchange.feed(chunk)
            exchange.feed(b"data: " + chunk + b"\n\n")
        exchange.finish()
        call = exchange.records(delivered=True)[0]
        assert exchange.ended and call.status == "failed" and call.error and not call.delivered


# --- a call that goes well ------------------------------------------------------------------------------

ANSWER = Answer(text="Hé", reasoning="hm", tool_calls=[("Bash", '{"command": "ls"}')], tokens_per_chunk=2)


@each
@pytest.mark.parametrize("stream", [True, False])
def test_the_record_holds_what_was_sampled(provider: Provider, stream: bool) -> None:
    exchange = begun(provider, stream=stream, clock=ticking().__next__)
    out = [exchange.feed(event) for event in events(ANSWER)]
    end = exchange.finish()
    call = exchange.records(delivered=True)[0]
    tokens = sampled(ANSWER)
    assert call.prompt_token_ids == PROMPT_IDS
    assert call.completion_token_ids == [t.token_id for t in tokens]
    assert call.behaviour_logprobs == [t.logprob for t in tokens]
    assert (call.usage.prompt_tokens, call.usage.completion_tokens) == (len(PROMPT_IDS), len(tokens))
    assert (call.status, call.delivered, call.finish_reason, call.error) == ("ok", True, "tool_calls", None)
    assert (call.call_id, call.rollout_id, call.seq) == (CALL_ID, "r1", 3)
    assert (call.dialect, call.route, call.stream) == (
        provider.name,
        f"POST {provider.path.partition('?')[0]}",
        stream,
    )
    assert (call.model_requested, call.model_served, call.policy_version) == ("claimed", "tiny", "tiny@7")
    assert call.wire.request_body == provider.body(stream=stream)
    assert call.wire.request_headers == [("a", "b")]
    assert json.loads(call.upstream_body)["model"] == "tiny"
    assert call.started_at == 1000.0 < cast(float, call.first_token_at) < cast(float, call.ended_at)
    assert call.wire.status == 200
    assert call.wire.chunk_at_ms == sorted(call.wire.chunk_at_ms)
    if stream:
        assert all(o for o, event in zip(out, events(ANSWER), strict=True) if b'"content": "' in event)
        assert isinstance(end, bytes) and provider.last_event in end
        assert provider.last_event not in b"".join(out)
    else:
        assert not any(out) and isinstance(end, Reply) and end.status == 200
        assert json.loads(end.body)["model"] == "claimed"


@each
def test_delivered_is_the_connections_word(provider: Provider) -> None:
    exchange = begun(provider)
    for event in events(ANSWER):
        exchange.feed(event)
    exchange.finish()
    call = exchange.records(delivered=False)[0]
    assert (call.status, call.delivered) == ("ok", False)


@each
def test_an_outcome_is_final(provider: Provider) -> None:
    exchange = begun(provider)
    for event in events(ANSWER):
        exchange.feed(event)
    exchange.finish()
    before = msgspec.json.encode(exchange.records(delivered=True)[0], enc_hook=list)
    assert exchange.feed(events(ANSWER)[1]) == b""
    assert exchange.finish() == exchange.fail(PolarError("upstream", "late")) == b""
    assert exchange.keepalive() == b""
    exchange.cancel()
    assert msgspec.json.encode(exchange.records(delivered=True)[0], enc_hook=list) == before


@each
def test_a_slow_engines_stream_begins_without_it(provider: Provider) -> None:
    patient, quick = begun(provider), begun(provider)
    opening, ping = patient.opening(), patient.keepalive()
    assert opening and patient.opening() == b""
    assert ping == provider.keepalive
    data = b"".join(events(ANSWER))
    assert opening + patient.feed(data) == quick.feed(data)
    assert patient.finish() == quick.finish()
    assert patient.records(delivered=True)[0].wire.response_body.startswith(opening + ping)


@each
def test_a_ping_never_comes_before_the_beginning(provider: Provider) -> None:
    early, late = begun(provider), begun(provider)
    assert early.keepalive() == late.opening() + late.keepalive()


@each
def test_a_whole_answer_is_not_kept_alive(provider: Provider) -> None:
    exchange = begun(provider, stream=False)
    assert exchange.keepalive() == exchange.opening() == b""


# --- sampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "ours", "sent"),
    [
        (100, None, 100),
        (100, 50, 50),
        (50, 100, 50),
        (None, 50, 50),
        (None, None, None),
        (4095, None, 4095),
        (4096, None, None),
        (128_000, None, None),
        (128_000, 200, 200),
        (128_000, 100_000, None),
    ],
)
def test_max_tokens_is_the_least_of_all_and_inside_the_window(
    asked: int | None, ours: int | None, sent: int | None
) -> None:
    exchange = new(OPENAI, Settings(max_tokens=ours))
    step = start(exchange, OPENAI, OPENAI.body(max_output_tokens=asked))
    assert isinstance(step, UpstreamRequest)
    assert json.loads(step.body).get("max_tokens") == sent
    assert exchange.call.sampling.max_tokens == sent
    assert exchange.call.sampling_requested.max_tokens == asked


def test_the_rollouts_sampling_wins_and_both_are_recorded() -> None:
    settings = Settings(temperature=0.7, top_p=0.9, top_k=40)
    exchange = new(ANTHROPIC, settings)
    body = ANTHROPIC.body(temperature=0.1, top_p=0.2, top_k=3, stop_sequences=["END"], max_tokens=9)
    step = start(exchange, ANTHROPIC, body)
    assert isinstance(step, UpstreamRequest)
    sent = json.loads(step.body)
    assert (sent["temperature"], sent["top_p"], sent["top_k"]) == (0.7, 0.9, 40)
    assert (sent["stop"], sent["max_tokens"]) == (["END"], 9)
    assert exchange.call.sampling == Sampling(0.7, 0.9, 40, 9, ["END"])
    assert exchange.call.sampling_requested == Sampling(0.1, 0.2, 3, 9, ["END"])
    assert step.url == "http://engine/v1/chat/completions" and step.stream


def test_what_the_translation_left_out_is_noted() -> None:
    exchange = new(ANTHROPIC)
    start(exchange, ANTHROPIC, ANTHROPIC.body(system="x-anthropic-billing-header: a=b\nYou are good."))
    assert exchange.call.notes == ["dropped:billing_header"]


def test_the_harness_says_what_a_call_is_for() -> None:
    exchange = new(ANTHROPIC)
    wire = Wire("POST", "host", "/v1/messages", [], ANTHROPIC.body())
    exchange.start(wire, {"x-claude-code-request-class": "auxiliary"})
    assert exchange.call.role == "auxiliary"


# --- requests that are refused --------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"model": 5}', b"\xff\xfe", b'{"model": "m", "max_tokens": "x"}']
)
def test_a_bad_request_is_answered_without_the_engine(provider: Provider, body: bytes) -> None:
    exchange = new(provider)
    reply = start(exchange, provider, body)
    assert isinstance(reply, Reply) and reply.status == 400
    assert json.loads(reply.body)["error"]["type"] == "invalid_request_error"
    call = exchange.records(delivered=True)[0]
    assert (call.status, call.delivered, call.wire.status) == ("refused", False, 400)
    assert call.error and call.error.startswith("bad_request: ")
    assert call.wire.request_body == body and call.wire.response_body == reply.body
    assert not call.upstream_body and not call.prompt_token_ids
    assert call.ended_at is not None


@each
def test_a_request_refused_by_the_caller(provider: Provider) -> None:
    exchange = new(provider)
    reply = exchange.refuse(PolarError("too_large", "too much"), Wire("POST", "h", provider.path))
    assert reply.status == 413
    call = exchange.records(delivered=True)[0]
    assert (call.status, call.error) == ("refused", "too_large: too much")
    assert call.route == f"POST {provider.path.partition('?')[0]}"


class Buggy:
    """A dialect that fails in one method."""

    def __init__(self, provider: Provider, method: str) -> None:
        self._dialect, self._method = DIALECTS[provider.name], method

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any) -> Any:
            raise ZeroDivisionError(self._method)

        if name == self._method:
            return fail
        inner = getattr(self._dialect, name)
        if name != "encoder":
            return inner

        def encoder(*args: Any) -> Any:
            made = inner(*args)
            for method in self._method.split("+"):
                if hasattr(made, method):
                    setattr(made, method, fail)
            return made

        return encoder


@each
@pytest.mark.parametrize("method", ["decode", "encoder"])
def test_our_own_bug_in_a_request_is_a_reply(provider: Provider, method: str) -> None:
    exchange = new(provider, dialect=Buggy(provider, method))
    reply = start(exchange, provider, provider.body())
    assert isinstance(reply, Reply) and reply.status == 500
    call = exchange.records(delivered=True)[0]
    assert call.status == "refused" and "ZeroDivisionError" in cast(str, call.error)


@each
@pytest.mark.parametrize("method", ["start", "delta", "finish"])
def test_our_own_bug_in_a_stream_is_an_error_event(provider: Provider, method: str) -> None:
    exchange = begun(provider, dialect=Buggy(provider, method))
    out = b"".join(map(exchange.feed, events(ANSWER))) + the_end(exchange)
    assert method == "start" or provider.error_event in out
    assert provider.last_event not in out
    call = exchange.records(delivered=True)[0]
    assert call.status == "failed" and cast(str, call.error).startswith("internal: ")
    assert call.prompt_token_ids  # what came before is known all the same


@each
def test_an_encoder_that_cannot_even_say_so_is_cut_off(provider: Provider) -> None:
    exchange = begun(provider, dialect=Buggy(provider, "delta+error"))
    out = b"".join(map(exchange.feed, events(ANSWER))) + the_end(exchange)
    assert provider.error_event not in out and provider.last_event not in out
    assert exchange.records(delivered=True)[0].status == "failed"


@each
def test_our_own_bug_in_a_whole_answer_is_a_reply(provider: Provider) -> None:
    exchange = begun(provider, stream=False, dialect=Buggy(provider, "encode"))
    for event in events(ANSWER):
        exchange.feed(event)
    reply = exchange.finish()
    assert isinstance(reply, Reply) and reply.status == 500
    assert exchange.records(delivered=True)[0].status == "failed"


# --- engines that fail ----------------------------------------------------------------------------------

BROKEN = b'data: {"error": {"message": "out of memory"}}\n\n'


@each
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("how", ["event", "cut", "connection"])
def test_before_the_head_a_broken_engine_is_an_overloaded_one(
    provider: Provider, stream: bool, after: int, how: str
) -> None:
    exchange = begun(provider, stream=stream, released=False)
    data = b"".join(events(ANSWER)[:after])
    exchange.feed(data + BROKEN if how == "event" else data)
    reply = exchange.fail(PolarError("upstream", "gone")) if how == "connection" else exchange.finish()
    assert isinstance(reply, Reply)
    assert (reply.status, reply.headers["retry-after"]) == (provider.overloaded, "5")
    call = exchange.records(delivered=True)[0]
    assert (call.status, call.wire.status, call.delivered) == ("failed", provider.overloaded, False)
    assert cast(str, call.error).startswith("overloaded: ")
    assert call.wire.response_body == reply.body and call.wire.chunk_sizes == [len(reply.body)]
    assert (call.completion_token_ids != []) == (after > 1)


@each
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("how", ["event", "cut", "connection"])
def test_after_the_head_it_is_the_dialects_error_event(provider: Provider, after: int, how: str) -> None:
    exchange = begun(provider)
    good = exchange.feed(b"".join(events(ANSWER)[:after]))
    bad = exchange.feed(BROKEN) if how == "event" else b""
    end = exchange.fail(PolarError("upstream", "gone")) if how == "connection" else exchange.finish()
    assert isinstance(end, bytes)
    assert (bad + end).count(provider.error_event) == 1 and provider.error_event not in good
    assert good + bad + end == exchange.records(delivered=True)[0].wire.response_body
    assert (good + bad).startswith(begun(provider).opening() if after or bad else b"")
    call = exchange.records(delivered=True)[0]
    assert (call.status, call.wire.status, call.finish_reason) == ("failed", 200, None)
    assert call.completion_token_ids == [t.token_id for t in sampled(ANSWER)][: max(0, after - 1) * 2]
    assert len(call.behaviour_logprobs) == len(call.completion_token_ids)


@each
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("status", "body", "ours"),
    [(500, b"boom", None), (503, b"", None), (400, b'{"error": {"message": "no tools"}}', 400)],
)
def test_an_engines_refusal(
    provider: Provider, stream: bool, status: int, body: bytes, ours: int | None
) -> None:
    exchange = begun(provider, stream=stream, released=False)
    reply = exchange.reject(status, body)
    assert reply.status == (ours or provider.overloaded)
    assert exchange.records(delivered=True)[0].status == "failed"


@each
def test_a_prompt_over_the_window_is_the_providers_overflow(provider: Provider) -> None:
    exchange = begun(provider, released=False)
    reply = exchange.reject(400, b'{"error": {"message": "maximum context length is 8"}}')
    assert reply.status == 400
    words = b"prompt is too long" if provider is ANTHROPIC else b"context_length_exceeded"
    assert words in reply.body
    assert cast(str, exchange.records(delivered=True)[0].error).startswith("context_overflow: ")


@each
def test_an_answer_that_the_engine_aborted_is_no_answer(provider: Provider) -> None:
    exchange = begun(provider)
    out = b"".join(map(exchange.feed, events(Answer(text="half", finish_reason="abort"))))
    assert provider.error_event in out + the_end(exchange)
    call = exchange.records(delivered=True)[0]
    assert (call.status, call.finish_reason) == ("failed", "abort")


# --- harnesses that leave -------------------------------------------------------------------------------


def test_weights_that_change_meanwhile_are_told_of_the_first_and_the_last_token() -> None:
    now = ["step-1"]
    exchange = Exchange(
        DIALECTS["anthropic"], ENGINE, Settings(), rollout_id="r1", seq=0, policy_version=lambda: now[0]
    )
    start(exchange, ANTHROPIC, ANTHROPIC.body())
    assert exchange.call.policy_version == "step-1"  # also of a call that will have no tokens
    seen = []
    for event, now[0] in zip(events(ANSWER), ["step-2", "step-3", "step-3", "step-4"], strict=False):
        exchange.feed(event)
        seen.append((exchange.call.policy_version, exchange.call.policy_version_last))
    assert seen == [("step-1", None), ("step-3", None), ("step-3", None), ("step-3", "step-4")]


@each
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_hang_up_keeps_what_was_sampled(provider: Provider, stream: bool, after: int) -> None:
    exchange = begun(provider, stream=stream, released=after > 0)
    for event in events(ANSWER)[:after]:
        exchange.feed(event)
    exchange.cancel()
    call: ModelCall = exchange.records(delivered=False)[0]
    assert (call.status, call.delivered, call.finish_reason) == ("cancelled", False, None)
    assert call.error == "the harness hung up"
    assert call.completion_token_ids == [t.token_id for t in sampled(ANSWER)][: max(0, after - 1) * 2]
    assert call.prompt_token_ids == (PROMPT_IDS if after else [])
    assert call.ended_at is not None
    assert exchange.feed(events(ANSWER)[after]) == b""
