"""What the Gemini dialect answers: both forms of a stream, whole answers, errors. The SDK reads it."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pydantic
import pytest
from google.genai import errors, types
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.gemini_request import JSON_ARRAY
from polar_mitm.dialects.ids import sibling, unseal
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.sse import SSEDecoder
from polar_mitm.types import ChatRequest, Completion, Delta, Message, TextPart, TokenLogprob
from tests.dialects.answers import split
from tests.dialects.gemini_sdk import (
    ARRAY,
    CALL,
    DIALECT,
    SSE,
    WHOLE,
    answer,
    client,
    joined,
    responder,
    streamed,
)

SHOWN = {"thinking_config": {"include_thoughts": True}}
_objects = st.dictionaries(
    st.text(max_size=4),
    st.none() | st.integers(-(2**53), 2**53) | st.text(max_size=6) | st.booleans(),
    max_size=3,
)
_calls = st.lists(st.tuples(st.sampled_from(["shell", "write"]), _objects.map(json.dumps)), max_size=3)
_texts = st.text(max_size=20)


def ask(**fields: Any) -> ChatRequest:
    return ChatRequest("m", [Message("user", [TextPart("hi")])], stream=True, **fields)


def array(**fields: Any) -> ChatRequest:
    return ask(notes=[JSON_ARRAY], **fields)


def chunks(wire: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream in either form."""
    if wire.startswith(b"["):
        return json.loads(wire)  # type: ignore[no-any-return]
    events = SSEDecoder().feed(wire)
    assert all(event.event == "" for event in events)
    return [json.loads(event.data) for event in events]


def parts_of(body: dict[str, Any], candidate: int = 0) -> list[dict[str, Any]]:
    return body["candidates"][candidate]["content"]["parts"]  # type: ignore[no-any-return]


def sealed(part: Any) -> Any:
    signature = part["thoughtSignature"] if isinstance(part, dict) else part.thought_signature
    blob = base64.b64decode(signature) if isinstance(signature, str) else signature
    return unseal(blob.decode())


def test_the_dialect_is_registered() -> None:
    assert DIALECTS["gemini"].tool_id_prefix == "call"


# --- the official SDK as oracle -------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(_texts, _texts, _calls, st.integers(1, 9), st.sampled_from([SHOWN, {}]))
def test_the_sdk_reads_the_same_answer_streamed_and_whole(
    reasoning: str, text: str, calls: list[tuple[str, str]], size: int, config: Any
) -> None:
    completion = answer(text, reasoning or None, calls)
    sdk = client(responder(completion, size)).models
    created = sdk.generate_content(model="m", contents="hi", config=config)
    got = list(sdk.generate_content_stream(model="m", contents="hi", config=config))

    assert created.candidates and created.candidates[0].content
    whole = created.candidates[0].content.parts or []
    stream = joined(chunk.candidates[0].content for chunk in got if chunk.candidates)
    if text and stream[-1].text == "":  # the empty text that carries the end
        stream.pop()
    assert stream == whole
    assert got[-1].candidates and got[-1].candidates[0].finish_reason == types.FinishReason.STOP
    assert created.candidates[0].finish_reason == types.FinishReason.STOP
    assert got[-1].usage_metadata == created.usage_metadata
    assert {chunk.response_id for chunk in got} == {created.response_id} == {f"resp_{CALL}"}
    assert {chunk.model_version for chunk in got} == {"m"}

    thoughts = [p.text for p in whole if p.thought]
    assert thoughts == ([reasoning] if reasoning and config is SHOWN else [])
    assert "".join(p.text or "" for p in whole if not p.thought) == text
    called = [p.function_call for p in whole if p.function_call]
    assert [(c.id, c.name, c.args) for c in called] == [
        (f"call_{CALL}_{i}", name, json.loads(arguments)) for i, (name, arguments) in enumerate(calls)
    ]
    first = next(p for p in whole if not p.thought)
    assert (sealed(first).call_id, sealed(first).text) == (CALL, reasoning or None)
    if called:
        assert sealed(next(p for p in whole if p.function_call)).call_id == CALL


@settings(deadline=None, max_examples=60)
@given(_texts, _texts, _calls, st.sampled_from([SHOWN, {}]), st.booleans(), st.booleans())
def test_what_we_answer_comes_back_as_it_was_sampled(
    reasoning: str, text: str, calls: list[tuple[str, str]], config: Any, stream: bool, thoughts: bool
) -> None:
    completion = answer(text, reasoning or None, calls)
    sdk = client(responder(completion)).models
    ask = sdk.generate_content_stream if stream else lambda **k: [sdk.generate_content(**k)]
    contents = [c.candidates[0].content for c in ask(model="m", contents="hi", config=config)]  # type: ignore[operator]
    if not thoughts:  # as Gemini CLI does
        for content in contents:
            content.parts = [p for p in content.parts if not p.thought]
    seen: list[ChatRequest] = []

    def respond(request: ChatRequest) -> Reply:
        seen.append(request)
        return DIALECT.encode(request, answer("ok"), CALL, 0.0)

    history = [types.Content(role="user", parts=[types.Part(text="hi")]), *contents]
    client(respond).models.generate_content(model="m", contents=[*history, types.UserContent("go on")])
    assert [m.role for m in seen[0].messages] == ["user", "assistant", "user"]
    message = seen[0].messages[1]
    assert (message.reasoning or "", message.text) == (reasoning, text)
    assert [(c.id, c.name, json.loads(c.arguments)) for c in message.tool_calls] == [
        (f"call_{CALL}_{i}", name, json.loads(arguments)) for i, (name, arguments) in enumerate(calls)
    ]
    assert message.minted_ids == [f"rs_{CALL}", *(f"call_{CALL}_{i}" for i in range(len(calls)))]


@pytest.mark.parametrize("version", ["v1beta", "v1alpha", "v1"])
def test_the_sdk_s_chats_go_on_with_what_was_sampled(version: str) -> None:
    seen: list[ChatRequest] = []

    def respond(request: ChatRequest) -> Reply:
        seen.append(request)
        return responder(answer("one two three", "hm"))(request)

    chat = client(respond, version).chats.create(model="m", config=SHOWN)  # type: ignore[arg-type]
    said = [chunk.text for chunk in chat.send_message_stream("first")]
    assert "".join(filter(None, said)) == "one two three"
    assert chat.send_message("second").text == "one two three"
    list(chat.send_message_stream("third"))
    assert [(m.role, m.text, m.reasoning) for m in seen[2].messages] == [
        ("user", "first", None),
        ("assistant", "one two three", "hm"),
        ("user", "second", None),
        ("assistant", "one two three", "hm"),
        ("user", "third", None),
    ]


def test_the_sdk_calls_functions_of_its_own() -> None:
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    add.__annotations__ = {"a": int, "b": int, "return": int}  # the SDK looks for types, not their names
    seen: list[ChatRequest] = []

    def respond(request: ChatRequest) -> Reply:
        seen.append(request)
        called = answer("sums", "hm", [("add", '{"a": 1,\n "b": 2}'), ("add", '{"a": 3, "b": 4}')])
        return responder(called if len(seen) == 1 else answer("3 and 7"))(request)

    config = types.GenerateContentConfig(tools=[add])
    assert client(respond).models.generate_content(model="m", contents="hi", config=config).text == "3 and 7"
    assert [t.name for t in seen[0].tools] == ["add"]
    assert seen[0].tools[0].parameters["properties"] == {"a": {"type": "integer"}, "b": {"type": "integer"}}
    assert [c.arguments for c in seen[1].messages[1].tool_calls] == ['{"a": 1, "b": 2}', '{"a": 3, "b": 4}']
    assert [(m.role, m.text, m.tool_call_id) for m in seen[1].messages[2:]] == [
        ("tool", '{"result": 3}', f"call_{CALL}_0"),
        ("tool", '{"result": 7}', f"call_{CALL}_1"),
    ]


def test_the_asynchronous_sdk() -> None:
    async def run() -> tuple[Any, list[Any], str]:
        sdk = client(responder(answer("hello there", "hm"))).aio
        whole = await sdk.models.generate_content(model="m", contents="hi")
        stream = [c async for c in await sdk.models.generate_content_stream(model="m", contents="hi")]
        chat = sdk.chats.create(model="m")
        said = [c.text or "" async for c in await chat.send_message_stream("hi")]
        return whole, stream, "".join(said)

    whole, stream, said = asyncio.run(run())
    assert whole.text == "".join(c.text or "" for c in stream) == said == "hello there"
    assert stream[-1].usage_metadata == whole.usage_metadata


def test_the_sdk_reads_structured_output() -> None:
    class Point(pydantic.BaseModel):
        x: int
        tags: list[str]

    seen: list[ChatRequest] = []

    def respond(request: ChatRequest) -> Reply:
        seen.append(request)
        return DIALECT.encode(request, answer('{"x": 1, "tags": ["a"]}'), CALL, 0.0)

    config = {"response_mime_type": "application/json", "response_schema": Point}
    got = client(respond).models.generate_content(model="m", contents="hi", config=config)  # type: ignore[arg-type]
    assert got.parsed == Point(x=1, tags=["a"])
    schema = seen[0].response_schema
    assert schema is not None and schema["properties"]["tags"]["items"]["type"] == "string"
    assert schema["type"] == "object" and schema["required"] == ["x", "tags"]


@pytest.mark.parametrize("size", [1, 5, 99])
def test_the_sdk_reads_one_word_of_several(size: int) -> None:
    """`text/x.enum` answers with the bare word; guided decoding samples it inside JSON."""
    config: Any = {
        "response_mime_type": "text/x.enum",
        "response_schema": {"type": "STRING", "enum": ["wind", "string"]},
    }
    seen: list[ChatRequest] = []

    def respond(request: ChatRequest) -> Reply:
        seen.append(request)
        return responder(answer('{"input": "wind"}', "hm"), size)(request)

    sdk = client(respond).models
    assert sdk.generate_content(model="m", contents="flute", config=config).text == "wind"
    got = sdk.generate_content_stream(model="m", contents="flute", config=config)
    assert "".join(chunk.text or "" for chunk in got) == "wind"
    schema = seen[0].response_schema
    assert schema is not None and schema["required"] == ["input"]
    assert schema["properties"]["input"] == {"type": "string", "enum": ["wind", "string"]}


# --- both forms of a stream -----------------------------------------------------------------------------


@settings(deadline=None)
@given(_texts, _texts, _calls, st.integers(1, 9), st.booleans())
def test_an_array_holds_the_chunks_of_the_events(
    reasoning: str, text: str, calls: list[tuple[str, str]], size: int, shown: bool
) -> None:
    completion = answer(text, reasoning or None, calls)
    deltas = split(completion, size)
    events = streamed(ask(show_reasoning=shown), deltas, completion)
    elements = streamed(array(show_reasoning=shown), deltas, completion)
    assert events.startswith(b"data: ") and elements.startswith(b"[{")
    assert chunks(events) == chunks(elements)


@pytest.mark.parametrize("char", ["\n", "\r", "\x85", "\u2028", "\u2029", "\x0b", "\x1c"])
def test_no_line_ends_inside_a_chunk(char: str) -> None:
    """SDKs split lines as Unicode does; a model's own JSON may have line breaks between its tokens."""
    completion = answer(f"a{char}b", f"c{char}d", [("f", '{\n "x": ' + json.dumps(f"y{char}z") + "\r\n}")])
    wire = streamed(ask(), split(completion, 99), completion)
    assert all(line.startswith("data: ") for line in wire.decode().splitlines() if line)
    assert parts_of(chunks(wire)[-1])[0]["functionCall"]["args"] == {"x": f"y{char}z"}
    parts = parts_of(json.loads(DIALECT.encode(ask(), completion, CALL, 0.0).body))
    assert [parts[0]["text"], parts[1]["text"]] == [f"c{char}d", f"a{char}b"]


def test_the_terminal_chunk_comes_with_finish_only() -> None:
    completion = answer("hello", None, [("f", "{}")])
    encoder = DIALECT.encoder(ask(), CALL, 0.0)
    before = encoder.start() + b"".join(map(encoder.delta, split(completion, 2)))
    assert b"finishReason" not in before and b"functionCall" not in before
    (last,) = chunks(encoder.finish(completion))
    assert last["candidates"][0]["finishReason"] == "STOP"
    assert last["usageMetadata"] == {
        "promptTokenCount": 30,
        "candidatesTokenCount": 5,
        "thoughtsTokenCount": 2,
        "totalTokenCount": 37,
        "cachedContentTokenCount": 10,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 30}],
    }


def test_nothing_that_gemini_cli_takes_for_a_broken_answer() -> None:
    """No comments, and no chunk without a candidate or without parts."""
    encoder = DIALECT.encoder(ask(), CALL, 0.0)
    assert encoder.start() + encoder.delta(Delta(token_ids=[1])) == b""
    done = answer("", "thoughts only")
    wire = encoder.keepalive() + b"".join(map(encoder.delta, split(done, 3))) + encoder.finish(done)
    assert all(line.startswith(b"data: ") for line in wire.splitlines() if line)
    for chunk in chunks(wire):
        assert chunk["candidates"][0]["content"]["parts"]


def test_an_answer_that_had_to_wait_is_what_was_sampled() -> None:
    seen: list[ChatRequest] = []
    done = answer("one two", "hm", [("f", "{}")])

    def respond(request: ChatRequest) -> Reply:
        seen.append(request)
        encoder = DIALECT.encoder(request, CALL, 0.0)
        wire = encoder.start() + encoder.keepalive()
        wire += b"".join(encoder.delta(d) + encoder.keepalive() for d in split(done, 3))
        return Reply(200, wire + encoder.finish(done), DIALECT.stream_headers(CALL, request))

    chat = client(respond).chats.create(model="m", config=SHOWN)  # type: ignore[arg-type]
    assert "".join(chunk.text or "" for chunk in chat.send_message_stream("first")) == "one two"
    list(chat.send_message_stream("second"))
    message = seen[1].messages[1]
    assert (message.text, message.reasoning, len(message.tool_calls)) == ("one two", "hm", 1)
    assert [m.role for m in seen[1].messages] == ["user", "assistant", "user"]


def test_an_array_waits_in_white_space() -> None:
    encoder = DIALECT.encoder(array(), CALL, 0.0)
    wire = encoder.start() + encoder.keepalive() + encoder.delta(Delta(text="a")) + encoder.keepalive()
    assert [parts_of(c)[0]["text"] for c in json.loads(wire + encoder.finish(answer("a")))] == ["a", ""]


def test_reasoning_between_texts_is_sealed_where_it_stands() -> None:
    completion = answer("ab", "onetwo")
    deltas = [Delta(reasoning="one"), Delta(text="a"), Delta(reasoning="two"), Delta(text="b")]
    parts = [p for c in chunks(streamed(ask(show_reasoning=False), deltas, completion)) for p in parts_of(c)]
    assert [(p["text"], sealed(p).text if "thoughtSignature" in p else None) for p in parts] == [
        ("a", "one"),
        ("b", "two"),
        ("", None),
    ]


def test_stream_headers() -> None:
    assert DIALECT.stream_headers(CALL, ask())["content-type"] == "text/event-stream"
    assert DIALECT.stream_headers(CALL, array())["content-type"].startswith("application/json")


# --- what an answer says --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("stop", "STOP"),
        ("tool_calls", "STOP"),
        ("length", "MAX_TOKENS"),
        ("abort", "MAX_TOKENS"),
        ("content_filter", "SAFETY"),
    ],
)
def test_finish_reasons(reason: Any, word: str) -> None:
    completion = answer("hi", finish_reason=reason)
    body = json.loads(DIALECT.encode(ask(), completion, CALL, 0.0).body)
    assert body["candidates"][0]["finishReason"] == word
    assert chunks(streamed(ask(), [], completion))[-1]["candidates"][0]["finishReason"] == word
    assert types.FinishReason(word)


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "nonsense", '"text"', "1"])
def test_arguments_that_are_no_object_are_not_lost(arguments: str) -> None:
    completion = answer("", None, [("f", arguments)])
    part = parts_of(chunks(streamed(ask(), split(completion, 3), completion))[-1])[0]
    assert part["functionCall"]["args"] == {
        "__unparsedToolInput": {"raw": arguments, "len": len(arguments.encode())}
    }
    body = json.dumps({"contents": [{"role": "model", "parts": [part]}]}).encode()
    # A harness writes the object anew, maybe with its keys in one line and no blanks.
    compact = body.replace(b'": ', b'":') if ": " not in arguments else body
    for echo in (body, compact):
        assert DIALECT.decode(echo, {}, WHOLE).messages[0].tool_calls[0].arguments == arguments


def test_no_arguments_are_an_empty_object() -> None:
    body = json.loads(DIALECT.encode(ask(), answer("", None, [("f", "")]), CALL, 0.0).body)
    assert parts_of(body)[0]["functionCall"]["args"] == {}


def test_an_empty_answer_has_one_empty_text() -> None:
    body = json.loads(DIALECT.encode(ask(), answer(), CALL, 0.0).body)
    (part,) = parts_of(body)
    assert part["text"] == "" and sealed(part).call_id == CALL


def several() -> Completion:
    others = [
        answer(f"answer {k}", f"thought {k}", [("f", f'{{"k": {k}}}')], sibling(CALL, k)) for k in (1, 2)
    ]
    return answer("answer 0", "thought 0", others=others)


def test_several_candidates_streamed_and_whole() -> None:
    completion = several()
    sdk = client(responder(completion)).models
    config: Any = {"candidate_count": 3, **SHOWN}
    created = sdk.generate_content(model="m", contents="hi", config=config)
    assert created.candidates and [c.index for c in created.candidates] == [0, 1, 2]
    by_index: dict[int, list[Any]] = {}
    for chunk in sdk.generate_content_stream(model="m", contents="hi", config=config):
        for candidate in chunk.candidates or ():
            by_index.setdefault(candidate.index or 0, []).append(candidate.content)
    for candidate in created.candidates:
        assert candidate.content and candidate.content.parts
        index = candidate.index or 0
        got = [p for p in joined(by_index[index]) if p.text != ""]
        assert got == candidate.content.parts
        first = next(p for p in got if not p.thought)
        assert (sealed(first).call_id, sealed(first).text) == (sibling(CALL, index), f"thought {index}")
        assert [p.function_call.id for p in got if p.function_call] == (
            [f"call_{sibling(CALL, index)}_0"] if index else []
        )


def test_logprobs_streamed_and_whole() -> None:
    top = [TokenLogprob("he", -0.5), TokenLogprob("ho", -1.5)]
    shown = [TokenLogprob("he", -0.5, top=top), TokenLogprob("llo", -0.1), TokenLogprob("", -0.3)]
    completion = answer("hello", shown_logprobs=shown)
    deltas = [
        Delta(shown_logprobs=shown[:1]),  # held back by a parser
        Delta(text="hello", shown_logprobs=shown[1:2]),
        Delta(shown_logprobs=shown[2:]),
    ]

    def respond(request: ChatRequest) -> Reply:
        assert request.top_logprobs == 2
        if request.stream:
            return Reply(200, streamed(request, deltas, completion), DIALECT.stream_headers(CALL))
        return DIALECT.encode(request, completion, CALL, 0.0)

    sdk, config = client(respond).models, {"response_logprobs": True, "logprobs": 2}
    created = sdk.generate_content(model="m", contents="hi", config=config)  # type: ignore[arg-type]
    assert created.candidates and created.candidates[0].logprobs_result
    result = created.candidates[0].logprobs_result
    assert [(c.token, c.log_probability) for c in result.chosen_candidates or ()] == [
        (t.token, t.logprob) for t in shown
    ]
    assert [len(t.candidates or ()) for t in result.top_candidates or ()] == [2, 0, 0]
    assert created.candidates[0].avg_logprobs == pytest.approx(-0.3)
    got = list(sdk.generate_content_stream(model="m", contents="hi", config=config))  # type: ignore[arg-type]
    results = [c.candidates[0].logprobs_result for c in got if c.candidates]
    assert [len(r.chosen_candidates or ()) for r in results if r] == [2, 1]
    assert got[-1].candidates and got[-1].candidates[0].avg_logprobs == pytest.approx(-0.3)


def test_logprobs_stay_out_where_nobody_asked() -> None:
    body = DIALECT.encode(ask(), answer("hello"), CALL, 0.0).body
    assert b"ogprobs" not in body


# --- errors ---------------------------------------------------------------------------------------------

_ERRORS: list[tuple[ErrorKind, int, str, str]] = [
    ("bad_request", 400, "INVALID_ARGUMENT", "why"),
    ("not_found", 404, "NOT_FOUND", "why"),
    ("too_large", 400, "INVALID_ARGUMENT", "payload size exceeds the limit"),
    ("context_overflow", 400, "INVALID_ARGUMENT", "exceeds the maximum number of tokens allowed"),
    ("overloaded", 503, "UNAVAILABLE", "overloaded"),
    ("upstream", 500, "INTERNAL", "why"),
    ("internal", 500, "INTERNAL", "why"),
]


@pytest.mark.parametrize(("kind", "status", "name", "words"), _ERRORS)
def test_the_sdk_raises_our_errors(kind: ErrorKind, status: int, name: str, words: str) -> None:
    error = PolarError(kind, "why")
    sdk = client(lambda _: DIALECT.encode_error(error, CALL)).models
    for ask in (sdk.generate_content, lambda **k: list(sdk.generate_content_stream(**k))):
        with pytest.raises(errors.APIError) as raised:
            ask(model="m", contents="hi")  # type: ignore[operator]
        assert (raised.value.code, raised.value.status) == (status, name)
        assert words in (raised.value.message or "")


@pytest.mark.parametrize(("kind", "status", "name", "words"), _ERRORS)
@pytest.mark.parametrize("begun", [False, True])
def test_the_sdk_raises_an_error_in_a_stream(
    kind: ErrorKind, status: int, name: str, words: str, begun: bool
) -> None:
    def respond(request: ChatRequest) -> Reply:
        encoder = DIALECT.encoder(request, CALL, 0.0)
        wire = encoder.start() + (encoder.delta(Delta(text="so far")) if begun else b"")
        return Reply(200, wire + encoder.error(PolarError(kind, "why {")), DIALECT.stream_headers(CALL))

    got: list[str | None] = []
    with pytest.raises(errors.APIError) as raised:
        got += (c.text for c in client(respond).models.generate_content_stream(model="m", contents="hi"))
    assert (raised.value.code, raised.value.status) == (status, name)
    assert words in (raised.value.message or "")


@pytest.mark.parametrize("begun", [False, True])
def test_an_array_that_ends_with_an_error_is_still_json(begun: bool) -> None:
    encoder = DIALECT.encoder(array(), CALL, 0.0)
    wire = encoder.start() + (encoder.delta(Delta(text="so far")) if begun else b"")
    *before, last = json.loads(wire + encoder.error(PolarError("upstream", "why")))
    assert len(before) == begun
    assert last["error"]["status"] == "INTERNAL"


def test_an_error_in_the_events_stands_bare() -> None:
    wire = DIALECT.encoder(ask(), CALL, 0.0).error(PolarError("overloaded", "why\nelse"))
    assert wire.endswith(b"\n") and json.loads(wire)["error"]["code"] == 503
    assert len(wire.splitlines()) == 1


def test_an_overloaded_engine_says_when_to_come_back() -> None:
    reply = DIALECT.encode_error(PolarError("overloaded", "busy", retry_after_s=7), CALL)
    assert reply.headers["retry-after"] == "7"
    assert json.loads(reply.body)["error"]["details"] == [
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}
    ]


def test_words_that_are_the_service_s_already_are_not_said_twice() -> None:
    words = "The input token count (9) exceeds the maximum number of tokens allowed (8)."
    body = json.loads(DIALECT.encode_error(PolarError("context_overflow", words)).body)
    assert body["error"]["message"] == words


def test_paths() -> None:
    body = b'{"contents":{"parts":{"text":"hi"}}}'
    kinds = [DIALECT.decode(body, {}, path) for path in (SSE, ARRAY, WHOLE)]
    assert [(r.stream, JSON_ARRAY in r.notes) for r in kinds] == [(True, False), (True, True), (False, False)]
