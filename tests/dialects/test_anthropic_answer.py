"""What the Anthropic dialect answers: event streams, whole messages, errors.

The official SDK's own accumulator is the oracle: a real client talks to the dialect through a transport that
decodes its request and encodes a scripted answer.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import anthropic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.dialects.anthropic import Anthropic
from polar_mitm.dialects.ids import unseal
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.sse import SSEDecoder
from polar_mitm.types import (
    ChatRequest,
    Completion,
    Delta,
    FinishReason,
    Message,
    Sampling,
    TextPart,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from tests.dialects.answers import pieces, split

CALL = "01JD0Z6Q3W0000000000000000"
dialect = Anthropic()


def ask(**fields: Any) -> ChatRequest:
    return ChatRequest("model-asked-for", [Message("user", [TextPart("hi")])], stream=True, **fields)


def answer(
    text: str = "",
    reasoning: str | None = None,
    calls: Iterable[tuple[str, str]] = (),
    finish: FinishReason | None = "stop",
    stop_reason: str | int | None = None,
) -> Completion:
    tool_calls = [
        ToolCall(f"toolu_{CALL}_{index}", name, arguments) for index, (name, arguments) in enumerate(calls)
    ]
    message = Message(
        "assistant", [TextPart(text)] if text else [], reasoning=reasoning, tool_calls=tool_calls
    )
    usage = Usage(prompt_tokens=30, completion_tokens=5, cached_tokens=10)
    return Completion(message, finish_reason=finish, stop_reason=stop_reason, usage=usage)


def stream(request: ChatRequest, deltas: Iterable[Delta], completion: Completion) -> bytes:
    encoder = dialect.encoder(request, CALL, 0.0)
    return encoder.start() + b"".join(map(encoder.delta, deltas)) + encoder.finish(completion)


def events(wire: bytes) -> list[dict[str, Any]]:
    out = []
    for event in SSEDecoder().feed(wire):
        data = json.loads(event.data)
        assert data["type"] == event.event
        out.append(data)
    return out


def whole(request: ChatRequest, completion: Completion) -> dict[str, Any]:
    reply = dialect.encode(request, completion, CALL, 0.0)
    assert reply.status == 200
    return json.loads(reply.body)  # type: ignore[no-any-return]


# --- the official SDK as oracle -------------------------------------------------------------------------


def client(respond: Callable[[ChatRequest], tuple[int, dict[str, str], bytes]]) -> anthropic.Anthropic:
    """The official client, talking to `respond` through the dialect's decoder."""
    # The SDK's HTTP library is httpx or its successor, by version.
    base = next(c for c in anthropic.DefaultHttpxClient.__mro__ if not c.__module__.startswith("anthropic"))
    http: Any = importlib.import_module(base.__module__.partition(".")[0])

    def handle(sent: Any) -> Any:
        request = dialect.decode(sent.read(), sent.headers, sent.url.path)
        status, headers, content = respond(request)
        return http.Response(status, headers=headers, content=content)

    transport = http.Client(transport=http.MockTransport(handle))
    return anthropic.Anthropic(api_key="any", http_client=transport, max_retries=0)


def sdk_stream(deltas: Iterable[Delta], completion: Completion, **fields: Any) -> Any:
    """The message that the SDK's accumulator builds from our stream."""
    sdk = client(lambda r: (200, dialect.stream_headers(CALL), stream(r, deltas, completion)))
    with sdk.messages.stream(
        model="model-asked-for", max_tokens=9, messages=[{"role": "user", "content": "hi"}], **fields
    ) as open_stream:
        return open_stream.get_final_message()


def sdk_create(completion: Completion, **fields: Any) -> Any:
    def respond(request: ChatRequest) -> tuple[int, dict[str, str], bytes]:
        assert not request.stream
        reply = dialect.encode(request, completion, CALL, 0.0)
        return reply.status, reply.headers, reply.body

    return client(respond).messages.create(
        model="model-asked-for", max_tokens=9, messages=[{"role": "user", "content": "hi"}], **fields
    )


SHOWN = {"thinking": {"type": "adaptive", "display": "summarized"}}
OMITTED = {"thinking": {"type": "adaptive", "display": "omitted"}}
_words = st.text(min_size=1, max_size=12)
_objects = st.dictionaries(
    st.text(max_size=4), st.none() | st.integers() | st.text(max_size=6) | st.lists(st.booleans()), max_size=3
)
_calls = st.lists(st.tuples(st.sampled_from(["Bash", "Write"]), _objects.map(json.dumps)), max_size=3)


@settings(deadline=None)
@given(
    st.text(max_size=20),
    st.text(max_size=20),
    _calls,
    st.integers(1, 9),
    st.sampled_from([SHOWN, OMITTED, {}]),
)
def test_the_sdk_rebuilds_what_was_sampled(
    reasoning: str, text: str, calls: list[tuple[str, str]], size: int, thinking: dict[str, Any]
) -> None:
    completion = answer(text, reasoning or None, calls, "tool_calls" if calls else "stop")
    streamed = sdk_stream(split(completion, size), completion, **thinking)
    created = sdk_create(completion, **thinking)

    assert streamed.id == created.id == f"msg_{CALL}"
    assert streamed.model == created.model == "model-asked-for"
    assert streamed.stop_reason == created.stop_reason == ("tool_use" if calls else "end_turn")
    assert streamed.usage.to_dict() == created.usage.to_dict()
    content = [b.to_dict() for b in created.content]
    got = [{k: v for k, v in b.to_dict().items() if k != "parsed_output"} for b in streamed.content]
    assert got == content

    expected: list[dict[str, Any]] = []
    if reasoning:
        signature = content[0].pop("signature")
        expected.append({"type": "thinking", "thinking": reasoning if thinking is SHOWN else ""})
        sealed = unseal(signature)
        assert sealed is not None
        assert (sealed.call_id, sealed.text) == (CALL, None if thinking is SHOWN else reasoning)
    if text:
        expected.append({"type": "text", "text": text})
    for index, (name, arguments) in enumerate(calls):
        use_id = f"toolu_{CALL}_{index}"
        expected.append({"type": "tool_use", "id": use_id, "name": name, "input": json.loads(arguments)})
    assert content == (expected or [{"type": "text", "text": ""}])


@settings(deadline=None)
@given(st.text(max_size=20), st.text(max_size=20), _calls, st.sampled_from([SHOWN, OMITTED, {}]))
def test_what_we_answer_comes_back_as_it_was_sampled(
    reasoning: str, text: str, calls: list[tuple[str, str]], thinking: dict[str, Any]
) -> None:
    completion = answer(text, reasoning or None, calls)
    first = sdk_stream(split(completion, 4), completion, **thinking)
    seen: list[ChatRequest] = []

    def respond(request: ChatRequest) -> tuple[int, dict[str, str], bytes]:
        seen.append(request)
        return 200, dialect.stream_headers(CALL), stream(request, [], answer())

    echo = [{"role": "assistant", "content": first.content}, {"role": "user", "content": "go on"}]
    with client(respond).messages.stream(model="m", max_tokens=9, messages=echo) as again:
        again.get_final_message()
    message = seen[0].messages[0]
    assert (message.reasoning or "", message.text) == (reasoning, text)
    assert [(c.id, c.name, json.loads(c.arguments)) for c in message.tool_calls] == [
        (f"toolu_{CALL}_{i}", name, json.loads(arguments)) for i, (name, arguments) in enumerate(calls)
    ]
    expected = [f"rs_{CALL}"] if reasoning else []
    assert message.minted_ids == expected + [c.id for c in message.tool_calls]


# --- the grammar of a stream ----------------------------------------------------------------------------

_FIELD = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}


def blocks_of(wire: bytes) -> list[tuple[str, str]]:
    """Check the event grammar; the type and joined deltas of each block."""
    found = events(wire)
    assert found[0]["type"] == "message_start"
    assert [e["type"] for e in found[-2:]] == ["message_delta", "message_stop"]
    blocks: list[tuple[str, str]] = []
    kind: str | None = None
    signed = False
    for event in found[1:-2]:
        if event["type"] == "ping":
            continue
        index = event["index"]
        if event["type"] == "content_block_start":
            assert kind is None and index == len(blocks)
            kind, signed = event["content_block"]["type"], False
            blocks.append((kind, ""))
        elif event["type"] == "content_block_stop":
            assert kind is not None and index == len(blocks) - 1
            assert signed is (kind == "thinking")
            kind = None
        else:
            assert event["type"] == "content_block_delta" and kind is not None and index == len(blocks) - 1
            delta = event["delta"]
            if delta["type"] == "signature_delta":
                assert kind == "thinking" and delta["signature"] and not signed
                signed = True
            else:
                assert delta["type"] == _FIELD[kind] and not signed
                value = next(v for k, v in delta.items() if k != "type")
                assert value != ""
                blocks[-1] = (kind, blocks[-1][1] + value)
    assert kind is None
    return blocks


_runs = st.lists(st.tuples(st.sampled_from(["thinking", "text", "tool_use"]), _words), max_size=8)


@given(_runs, st.data())
def test_any_run_of_deltas_split_any_way_is_a_valid_stream(
    runs: list[tuple[str, str]], data: st.DataObject
) -> None:
    deltas: list[Delta] = []
    expected: list[tuple[str, str]] = []
    num_calls = 0
    for kind, content in runs:
        fresh = kind == "tool_use" or not expected or expected[-1][0] != kind
        expected.append((kind, content)) if fresh else expected.append((kind, expected.pop()[1] + content))
        for number, piece in enumerate(pieces(content, data.draw(st.integers(1, 5)))):
            if kind == "tool_use":
                part = ToolCallDelta(num_calls, None if number else "Bash", piece)
                deltas.append(Delta(tool_calls=[part]))
            else:
                deltas.append(Delta(text=piece) if kind == "text" else Delta(reasoning=piece))
            deltas += [Delta(token_ids=[1])] * data.draw(st.integers(0, 1))
        num_calls += kind == "tool_use"
    completion = answer(calls=[("Bash", "{}")] * num_calls)
    assert blocks_of(stream(ask(), deltas, completion)) == (expected or [("text", "")])


def test_one_delta_may_hold_everything() -> None:
    calls = [ToolCallDelta(0, "Bash", "{}"), ToolCallDelta(1, "Write", "{"), ToolCallDelta(1, None, "}")]
    wire = stream(ask(), [Delta(text="b", reasoning="a", tool_calls=calls)], answer("b", "a"))
    assert blocks_of(wire) == [("thinking", "a"), ("text", "b"), ("tool_use", "{}"), ("tool_use", "{}")]


def test_a_call_that_the_engine_comes_back_to_is_an_engine_fault() -> None:
    encoder = dialect.encoder(ask(), CALL, 0.0)
    encoder.delta(Delta(tool_calls=[ToolCallDelta(0, "Bash", "{"), ToolCallDelta(1, "Bash", "{")]))
    with pytest.raises(PolarError) as caught:
        encoder.delta(Delta(tool_calls=[ToolCallDelta(0, None, "}")]))
    assert caught.value.kind == "upstream"


def test_the_bytes_of_a_short_stream() -> None:
    encoder = dialect.encoder(ask(), CALL, 0.0)
    assert encoder.start() == (
        b'event: message_start\ndata: {"type":"message_start","message":{'
        b'"id":"msg_01JD0Z6Q3W0000000000000000","type":"message","role":"assistant","model":"model-asked-for","content":[],"stop_reason":null,'
        b'"stop_sequence":null,"usage":{"input_tokens":0,"cache_creation_input_tokens":0,'
        b'"cache_read_input_tokens":0,"output_tokens":0}}}\n\n'
    )
    assert encoder.keepalive() == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert encoder.delta(Delta(token_ids=[1])) == b""
    assert encoder.delta(Delta(text='"a"\n')) == (
        b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        b'"content_block":{"type":"text","text":""}}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"\\"a\\"\\n"}}\n\n'
    )
    assert encoder.finish(answer('"a"\n')) == (
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn",'
        b'"stop_sequence":null},"usage":{"input_tokens":20,"cache_creation_input_tokens":0,'
        b'"cache_read_input_tokens":10,"output_tokens":5}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


def test_hidden_thinking_is_sealed_block_by_block() -> None:
    deltas = [Delta(reasoning="a"), Delta(text="b"), Delta(reasoning="c"), Delta(reasoning="d")]
    found = events(stream(ask(show_reasoning=False), deltas, answer("b", "acd")))
    signatures = [
        e["delta"]["signature"] for e in found if e.get("delta", {}).get("type") == "signature_delta"
    ]
    seals = [unseal(s) for s in signatures]
    assert [s and s.text for s in seals] == ["a", "cd"]
    assert not any(e.get("delta", {}).get("type") == "thinking_delta" for e in found)


# --- stop reasons, usage, arguments ---------------------------------------------------------------------

_CALL = [("Bash", "{}")]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (answer("a"), ("end_turn", None)),
        (answer("a", stop_reason="END"), ("stop_sequence", "END")),
        (answer("a", stop_reason="</s>"), ("end_turn", None)),
        (answer("a", stop_reason=151645), ("end_turn", None)),
        (answer(calls=_CALL, finish="tool_calls"), ("tool_use", None)),
        (answer(calls=_CALL, finish="stop"), ("tool_use", None)),
        (answer("a", finish="tool_calls"), ("end_turn", None)),
        (answer("a", finish="length"), ("max_tokens", None)),
        (answer(calls=_CALL, finish="length"), ("max_tokens", None)),
        (answer("a", finish="abort"), ("max_tokens", None)),
        (answer("a", finish="content_filter"), ("refusal", None)),
    ],
)
def test_stop_reasons(completion: Completion, expected: tuple[str, str | None]) -> None:
    request = ask(sampling=Sampling(stop=["STOP", "END"]))
    end = events(stream(request, [], completion))[-2]["delta"]
    body = whole(request, completion)
    assert (end["stop_reason"], end["stop_sequence"]) == expected
    assert (body["stop_reason"], body["stop_sequence"]) == expected


def test_usage_falls_back_on_the_token_ids() -> None:
    completion = Completion(Message("assistant"), [1, 2, 3], [4, 5], finish_reason="stop")
    usage = whole(ask(), completion)["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (3, 2)


@pytest.mark.parametrize("arguments", ['{"command": "lé', "[1]", '"x"', "nonsense", "[" * 100_000])
def test_arguments_that_are_no_object(arguments: str) -> None:
    completion = answer(calls=[("Bash", arguments)])
    deltas = [Delta(tool_calls=[ToolCallDelta(0, "Bash", arguments)])]
    assert blocks_of(stream(ask(), deltas, completion)) == [("tool_use", arguments)]  # as sampled
    block = whole(ask(), completion)["content"][0]
    assert block["input"] == {"__unparsedToolInput": {"raw": arguments, "len": len(arguments.encode())}}
    body = {"model": "m", "messages": [{"role": "assistant", "content": [block]}]}
    echoed = dialect.decode(json.dumps(body, separators=(",", ":")).encode(), {}, "")
    assert echoed.messages[0].tool_calls[0].arguments == arguments


def test_no_arguments_are_an_empty_object() -> None:
    completion = answer(calls=[("Now", "")])
    assert whole(ask(), completion)["content"][0]["input"] == {}
    message = sdk_stream([Delta(tool_calls=[ToolCallDelta(0, "Now")])], completion)
    assert message.content[0].input == {}


def test_arguments_keep_their_text_in_a_whole_answer() -> None:
    arguments = '{"b": 1.50, "a":\n"\\u00e9"}'
    assert arguments.encode() in dialect.encode(ask(), answer(calls=[("f", arguments)]), CALL, 0.0).body


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status", "name", "raised", "message"),
    [
        ("bad_request", 400, "invalid_request_error", anthropic.BadRequestError, "why"),
        ("not_found", 404, "not_found_error", anthropic.NotFoundError, "why"),
        ("too_large", 413, "request_too_large", anthropic.APIStatusError, "why"),
        (
            "context_overflow",
            400,
            "invalid_request_error",
            anthropic.BadRequestError,
            "prompt is too long: why",
        ),
        ("overloaded", 529, "overloaded_error", anthropic.APIStatusError, "why"),
        ("upstream", 500, "api_error", anthropic.InternalServerError, "Internal server error: why"),
        ("internal", 500, "api_error", anthropic.InternalServerError, "Internal server error: why"),
    ],
)
def test_errors_before_the_answer(
    kind: ErrorKind, status: int, name: str, raised: type[anthropic.APIStatusError], message: str
) -> None:
    reply = dialect.encode_error(PolarError(kind, "why", retry_after_s=3), CALL)
    assert reply.headers["retry-after"] == "3"
    sdk = client(lambda _: (reply.status, reply.headers, reply.body))
    with pytest.raises(raised) as caught:
        sdk.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.status_code == status
    assert caught.value.request_id == f"req_{CALL}"
    body: Any = caught.value.body
    assert body == {
        "type": "error",
        "error": {"type": name, "message": message},
        "request_id": f"req_{CALL}",
    }


def test_an_error_without_a_call() -> None:
    reply = dialect.encode_error(PolarError("not_found", "no such path"))
    assert "retry-after" not in reply.headers and "request-id" not in reply.headers
    assert json.loads(reply.body)["request_id"] is None


def test_an_overflow_in_the_providers_words_is_passed_on() -> None:
    words = "prompt is too long: 9 tokens > 8 maximum"
    reply = dialect.encode_error(PolarError("context_overflow", words), CALL)
    assert json.loads(reply.body)["error"]["message"] == words


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [("overloaded", "overloaded_error", "broke"), ("upstream", "api_error", "Internal server error: broke")],
)
def test_an_error_in_mid_stream_reaches_the_client(kind: ErrorKind, name: str, message: str) -> None:
    def respond(request: ChatRequest) -> tuple[int, dict[str, str], bytes]:
        encoder = dialect.encoder(request, CALL, 0.0)
        wire = (
            encoder.start() + encoder.delta(Delta(text="so far")) + encoder.error(PolarError(kind, "broke"))
        )
        return 200, dialect.stream_headers(CALL), wire

    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client(respond).messages.stream(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}]
        ) as open_stream,
    ):
        open_stream.get_final_message()
    body: Any = caught.value.body
    assert body["error"] == {"type": name, "message": message}


def test_the_sdk_sees_pings_as_nothing() -> None:
    encoder = dialect.encoder(ask(), CALL, 0.0)
    wire = encoder.start() + encoder.keepalive() + encoder.delta(Delta(text="a")) + encoder.keepalive()
    wire += encoder.delta(Delta(text="b")) + encoder.finish(answer("ab"))
    sdk = client(lambda _: (200, dialect.stream_headers(CALL), wire))
    messages: Any = [{"role": "user", "content": "hi"}]
    with sdk.messages.stream(model="m", max_tokens=9, messages=messages) as open_stream:
        assert open_stream.get_final_text() == "ab"
