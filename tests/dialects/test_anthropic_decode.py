"""Anthropic Messages requests to canonical: one test per rule of the translation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.anthropic import Anthropic
from polar_mitm.dialects.ids import seal
from polar_mitm.dialects.roles import caller
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, ImagePart, Message, TextPart, Tool, ToolCall, ToolChoice

FIXTURES = Path(__file__).parents[2] / "fixtures" / "anthropic"
CALL = "01JD0Z6Q3W0000000000000000"
dialect = Anthropic()


def decode(**fields: Any) -> ChatRequest:
    body = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}], **fields}
    return dialect.decode(json.dumps(body).encode(), {}, "/v1/messages")


def user(*blocks: Any) -> list[Message]:
    return decode(messages=[{"role": "user", "content": list(blocks)}]).messages


def assistant(*blocks: Any) -> Message:
    request = decode(
        messages=[{"role": "assistant", "content": list(blocks)}, {"role": "user", "content": "x"}]
    )
    return request.messages[0]


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def refusal(body: bytes) -> str:
    with pytest.raises(PolarError) as caught:
        dialect.decode(body, {}, "/v1/messages")
    assert caught.value.kind == "bad_request"
    return caught.value.message


def refused(**fields: Any) -> str:
    return refusal(json.dumps({"model": "m", "max_tokens": 8, "messages": [], **fields}).encode())


# --- system ---------------------------------------------------------------------------------------------


def test_system_blocks_become_one_leading_message() -> None:
    request = decode(system=[text("a", cache_control={"type": "ephemeral"}), text("b")])
    assert request.messages[0] == Message("system", [TextPart("a\n\nb")])
    assert decode(system="a").messages == decode(system=[text("a")]).messages
    assert [m.role for m in decode(system="").messages] == ["user"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_billing_header_is_dropped_wherever_it_stands(place: int) -> None:
    blocks = [text("a"), text("b")]
    blocks.insert(place, text("x-anthropic-billing-header: cc_version=1; cch=ab12;"))
    request = decode(system=blocks)
    assert request.messages[0].text == "a\n\nb"
    assert request.notes == ["dropped:billing_header"]


def test_only_the_billing_line_of_a_string_is_dropped() -> None:
    assert decode(system="x-anthropic-billing-header: cch=1\nBe brief.").messages[0].text == "Be brief."


def test_a_system_message_in_mid_conversation_becomes_marked_user_text() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "system", "content": [text("env"), text("more")]}]
    request = decode(system="s", messages=turns)
    assert [m.role for m in request.messages] == ["system", "user", "user"]
    assert request.messages[2].text == "<system>\nenv\n\nmore\n</system>"
    assert request.notes == ["moved:system_message"]
    assert decode(messages=[{"role": "system", "output_config": {"effort": "low"}}]).messages == []


# --- content --------------------------------------------------------------------------------------------


def test_string_and_list_content_are_the_same() -> None:
    as_list = [{"role": "user", "content": [text("hi", cache_control={"type": "ephemeral"})]}]
    assert decode(messages=as_list).messages == decode().messages
    assert user(text("")) == decode(messages=[{"role": "user", "content": ""}]).messages


def test_same_role_messages_are_not_merged() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert [m.text for m in decode(messages=turns).messages] == ["a", "b"]


def test_images() -> None:
    inline = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    remote = {"type": "url", "url": "https://example.org/a.png"}
    blocks = [{"type": "image", "source": inline}, text("?"), {"type": "image", "source": remote}]
    assert user(*blocks)[0].content == [
        ImagePart("data:image/png;base64,AAAA"),
        TextPart("?"),
        ImagePart("https://example.org/a.png"),
    ]


def test_an_image_kept_by_the_provider_is_told_as_text() -> None:
    blocks = [{"type": "image", "source": {"type": "file", "file_id": "file_1"}}]
    request = decode(messages=[{"role": "user", "content": blocks}])
    assert request.messages[0].text == "[image left out]"
    assert request.notes == ["placeholder:image"]


@pytest.mark.parametrize(
    ("source", "parts", "notes"),
    [
        ({"type": "text", "media_type": "text/plain", "data": "body"}, ["title", "body"], []),
        ({"type": "content", "content": "body"}, ["title", "body"], []),
        ({"type": "content", "content": [text("a"), text("b")]}, ["title", "a", "b"], []),
        (
            {"type": "base64", "media_type": "application/pdf", "data": "AA"},
            ["[document left out]"],
            ["placeholder:document"],
        ),
        ({"type": "url", "url": "https://e.org/a.pdf"}, ["[document left out]"], ["placeholder:document"]),
    ],
)
def test_documents(source: dict[str, Any], parts: list[str], notes: list[str]) -> None:
    blocks = [{"type": "document", "source": source, "title": "title"}]
    request = decode(messages=[{"role": "user", "content": blocks}])
    assert request.messages[0].content == [TextPart(p) for p in parts]
    assert request.notes == notes


def test_search_results_are_text() -> None:
    block = {"type": "search_result", "source": "https://e.org", "title": "T", "content": [text("found")]}
    assert user(block)[0].content == [TextPart("T (https://e.org)"), TextPart("found")]


@pytest.mark.parametrize(
    "kind", ["server_tool_use", "web_search_tool_result", "code_execution_tool_result", "mcp_tool_use"]
)
def test_the_providers_own_blocks_are_told_as_text(kind: str) -> None:
    block = {"type": kind, "id": "srvtoolu_1", "name": "web_search", "input": {}, "content": []}
    turns = [{"role": "assistant", "content": [block, text("done")]}, {"role": "user", "content": "ok"}]
    request = decode(messages=turns)
    assert request.messages[0].text == f"[{kind} left out]done"
    assert request.notes == [f"placeholder:{kind}"]


# --- tool calls and results -----------------------------------------------------------------------------


def test_tool_use_keeps_key_order_numbers_and_escapes() -> None:
    body = (
        b'{"model":"m","messages":[{"role":"assistant","content":[{"type":"tool_use","id":"t1","name":"f",'
        b'"input":{"z":1e2,"a":[1.50,{"k":"x: y, \\"q\\" \\u00e9"}],"n":99999999999999999999}}]}]}'
    )
    call = dialect.decode(body, {}, "").messages[0].tool_calls[0]
    expected = '{"z": 1e2, "a": [1.50, {"k": "x: y, \\"q\\" \\u00e9"}], "n": 99999999999999999999}'
    assert call == ToolCall("t1", "f", expected)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), _values, max_size=4), st.sampled_from([(",", ":"), (" , ", " :\n")]))
def test_arguments_are_written_as_chat_templates_write_them(value: Any, separators: tuple[str, str]) -> None:
    block = {"type": "tool_use", "id": "t", "name": "f", "input": value}
    body = {"model": "m", "messages": [{"role": "assistant", "content": [block]}]}
    wire = json.dumps(body, ensure_ascii=False, separators=separators).encode()
    arguments = dialect.decode(wire, {}, "").messages[0].tool_calls[0].arguments
    assert arguments == json.dumps(value, ensure_ascii=False)


def test_arguments_that_the_harness_could_not_parse_are_what_was_sampled() -> None:
    block = {"type": "tool_use", "id": "t", "name": "f"}
    raw = '{"command": "ls'
    call = assistant({**block, "input": {"__unparsedToolInput": {"raw": raw, "len": 15}}}).tool_calls[0]
    assert call.arguments == raw
    call = assistant({**block, "input": {"__unparsedToolInput": 3}}).tool_calls[0]
    assert json.loads(call.arguments) == {"__unparsedToolInput": 3}


def test_tool_results_come_before_what_the_user_says() -> None:
    messages = user(
        {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
        {"type": "tool_result", "tool_use_id": "t2", "content": [text("two")]},
        text("and now?"),
    )
    assert messages == [
        Message("tool", [TextPart("one")], tool_call_id="t1"),
        Message("tool", [TextPart("two")], tool_call_id="t2"),
        Message("user", [TextPart("and now?")]),
    ]


def test_tool_result_contents() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
    reference = {"type": "tool_reference", "tool_name": "Grep"}
    block = {"type": "tool_result", "tool_use_id": "t"}
    assert user({**block, "content": [text("a"), image, reference]})[0].content == [
        TextPart("a"),
        ImagePart("data:image/png;base64,AA"),
        TextPart("Tool loaded: Grep"),
    ]
    assert user({**block, "content": "no", "is_error": True})[0].content == [
        TextPart("Error:"),
        TextPart("no"),
    ]
    assert user(block)[0].content == user({**block, "content": None})[0].content == []


# --- thinking -------------------------------------------------------------------------------------------


def test_thinking_of_ours_comes_back_from_its_seal() -> None:
    sealed = {"type": "thinking", "thinking": "", "signature": seal(CALL, "because")}
    shown = {"type": "thinking", "thinking": "because", "signature": seal(CALL)}
    redacted = {"type": "redacted_thinking", "data": seal(CALL, "because")}
    for block in (sealed, shown, redacted):
        message = assistant(block, text("so"))
        assert (message.reasoning, message.text) == ("because", "so")
        assert message.minted_ids == [f"rs_{CALL}"]


@pytest.mark.parametrize("signature", ["", "EqQBCkYIARgCKkDforeign", "cG9sYXIbroken", None])
def test_thinking_of_others_is_its_text(signature: str | None) -> None:
    message = assistant({"type": "thinking", "thinking": "hm", "signature": signature})
    assert (message.reasoning, message.minted_ids) == ("hm", [])


def test_redacted_thinking_of_others_is_dropped() -> None:
    blocks = [{"type": "redacted_thinking", "data": "opaque"}, text("so")]
    request = decode(messages=[{"role": "assistant", "content": blocks}, {"role": "user", "content": "x"}])
    assert request.messages[0].reasoning is None
    assert request.notes == ["dropped:redacted_thinking"]


def test_blocks_that_a_stream_had_to_cut_are_joined_again() -> None:
    message = assistant(
        {"type": "thinking", "thinking": "a", "signature": ""},
        text("b"),
        {"type": "thinking", "thinking": "c", "signature": ""},
        text("d"),
    )
    assert (message.reasoning, message.content) == ("ac", [TextPart("bd")])


def test_minted_ids() -> None:
    ours = f"toolu_{CALL}_0"
    message = assistant(
        {"type": "thinking", "thinking": "", "signature": seal(CALL, "t")},
        {"type": "tool_use", "id": ours, "name": "f", "input": {}},
        {"type": "tool_use", "id": "toolu_01foreign", "name": "f", "input": {}},
    )
    assert message.minted_ids == [f"rs_{CALL}", ours]
    results = user(*({"type": "tool_result", "tool_use_id": i} for i in (ours, "toolu_01foreign")))
    assert [m.minted_ids for m in results] == [[ours], []]


def test_a_prefilled_answer_is_noted() -> None:
    request = decode(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "The"}])
    assert request.notes == ["dropped:prefill"]


# --- tools ----------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
GREP = {"name": "Grep", "description": "finds", "input_schema": SCHEMA, "strict": True}
WEB = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}


def test_function_tools_are_offered_and_server_tools_withheld() -> None:
    bash = {"type": "bash_20250124", "name": "bash"}
    request = decode(
        tools=[GREP, WEB, bash, {"type": "computer_toolset_20260801"}, {**GREP, "type": "custom"}]
    )
    assert request.tools == [Tool("Grep", "finds", SCHEMA)] * 2
    assert request.notes == ["withheld:web_search", "withheld:bash", "withheld:computer_toolset_20260801"]


def test_a_deferred_tool_is_withheld_until_the_conversation_loads_it() -> None:
    tools = [{**GREP, "defer_loading": True}]
    assert decode(tools=tools).tools == []
    assert decode(tools=tools).notes == ["withheld:Grep"]
    loaded = {"type": "tool_result", "tool_use_id": "t"}
    loaded["content"] = [{"type": "tool_reference", "tool_name": "Grep"}]  # type: ignore[assignment]
    added = [{"type": "tool_addition", "tool": {"type": "tool_reference", "name": "Grep"}}]
    for turn in ({"role": "user", "content": [loaded]}, {"role": "system", "content": added}):
        assert [t.name for t in decode(tools=tools, messages=[turn]).tools] == ["Grep"]


def test_a_removed_tool_is_withheld() -> None:
    removed = [{"type": "tool_removal", "tool": {"type": "tool_reference", "name": "Grep"}}]
    request = decode(tools=[GREP], messages=[{"role": "system", "content": removed}])
    assert (request.tools, request.notes) == ([], ["withheld:Grep"])
    inline = [{"type": "tool_addition", "tool": {"type": "tool_definition", "definition": GREP}}]
    assert decode(messages=[{"role": "system", "content": inline}]).notes == ["placeholder:tool_addition"]


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, ToolChoice(), None),
        ({"type": "auto"}, ToolChoice(), None),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice("required"), False),
        ({"type": "tool", "name": "Grep"}, ToolChoice("tool", "Grep"), None),
        ({"type": "none", "disable_parallel_tool_use": False}, ToolChoice("none"), True),
    ],
)
def test_tool_choice(choice: dict[str, Any] | None, expected: ToolChoice, parallel: bool | None) -> None:
    request = decode(tools=[GREP], tool_choice=choice)
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, parallel)


@pytest.mark.parametrize("choice", [{"type": "tool", "name": "web_search"}, {"type": "any"}])
def test_a_choice_of_what_is_withheld_is_dropped(choice: dict[str, Any]) -> None:
    request = decode(tools=[WEB], tool_choice=choice)
    assert request.tool_choice == ToolChoice()
    assert request.notes == ["withheld:web_search", "dropped:tool_choice"]


# --- the rest -------------------------------------------------------------------------------------------


def test_sampling_is_what_the_harness_asked() -> None:
    request = decode(max_tokens=7, temperature=1, top_p=0.5, top_k=40, stop_sequences=["a", "b"], stream=True)
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 1.0, 0.5)
    assert (sampling.top_k, sampling.stop) == (40, ["a", "b"])
    assert request.stream
    assert not decode().stream
    assert decode(stop_sequences=[]).sampling.stop is None


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "adaptive", "display": "summarized"}, True),
        ({"type": "adaptive", "display": "omitted"}, False),
    ],
)
def test_thinking_is_shown_where_it_is_asked_for(thinking: dict[str, Any] | None, shown: bool) -> None:
    assert decode(thinking=thinking).show_reasoning is shown


def test_structured_output() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    assert decode(output_config={"effort": "low", "format": form}).response_schema == SCHEMA
    assert decode(output_format=form).response_schema == SCHEMA
    assert decode(output_config={"effort": "low"}).response_schema is None


def test_unknown_fields_are_ignored() -> None:
    assert decode(fallbacks=[{"model": "x"}], diagnostics={}, new=[{}]) == decode()


# --- refusals -------------------------------------------------------------------------------------------

_TOOL_USE = {"type": "tool_use", "id": "t", "name": "f"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": {}}, "$.messages"),
        ({"model": 3}, "$.model"),
        ({"model": None}, "$.model"),
        ({"max_tokens": "8"}, "$.max_tokens"),
        ({"max_tokens": -1}, "$.max_tokens"),
        ({"top_k": 10**30}, "$.top_k"),
        ({"stream": "yes"}, "$.stream"),
        ({"system": {"type": "text"}}, "$.system"),
        ({"system": [{"type": "image", "text": ""}]}, "$.system[0].type"),
        ({"stop_sequences": "a"}, "$.stop_sequences"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'tool' - at `$.messages[0].role`"),
        ({"messages": [{"content": "x"}]}, "`role` - at `$.messages[0]`"),
        ({"messages": [{"role": "user"}]}, "`content` - at `$.messages[0]`"),
        ({"messages": [{"role": "user", "content": 3}]}, "$.messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "`type` - at `$.messages[0].content[0]`",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "'hologram'"),
        ({"messages": [{"role": "user", "content": [_TOOL_USE]}]}, "'tool_use'"),
        ({"messages": [{"role": "assistant", "content": [_TOOL_USE]}]}, "`input`"),
        (
            {"messages": [{"role": "assistant", "content": [text("a"), {**_TOOL_USE, "input": [1]}]}]},
            "messages[0].content[1].input",
        ),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [GREP, {"input_schema": {}}]}, "tools[1].name"),
        ({"tools": [{"name": "f", "input_schema": "{}"}]}, "$.tools[0].input_schema"),
        ({"tool_choice": {"type": "some"}}, "$.tool_choice.type"),
        ({"tools": [GREP], "tool_choice": {"type": "tool", "name": "Glob"}}, "'Glob'"),
        ({"tools": [GREP], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"output_config": {"format": {"type": "xml", "schema": {}}}}, "$.output_config.format.type"),
    ],
)
def test_wrong_types_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    assert named in refused(**fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"model":"m"}',
        b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"m","messages":[{"role":"assistant","content":'
        b'[{"type":"tool_use","id":"i","name":"n","input":{"a":"\xff"}}]}]}',
        b'{"model":"m","messages":[],"new":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_malformed_json_is_refused(body: bytes) -> None:
    assert refusal(body).startswith("invalid request body: ")


_wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("text"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_FULL = {
    **json.loads((FIXTURES / "claude_code_turn2.json").read_text())["body"],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "output_config": {"format": {"type": "json_schema", "schema": {}}},
}


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inner for p in _places(item, (*path, key)))]


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = _with(value[path[0]], path[1:], new)
    return copy


@given(st.sampled_from(_places(_FULL)), _wild)
def test_a_request_with_anything_anywhere_is_decoded_or_refused(path: tuple[Any, ...], new: Any) -> None:
    body = json.dumps(_with(_FULL, path, new)).encode()
    try:
        request = dialect.decode(body, {}, "")
    except PolarError as error:
        assert error.kind == "bad_request"
    else:
        # Whatever passed is well-formed canonical: strict conversion of its own parts gives it back.
        assert msgspec.convert(msgspec.to_builtins(request), ChatRequest) == request


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(noise: bytes) -> None:
    cut = json.dumps(_FULL).encode()
    for body in (noise, cut[: len(noise)] + noise + cut[2 * len(noise) :]):
        try:
            dialect.decode(body, {}, "")
        except PolarError as error:
            assert error.kind == "bad_request"


# --- whole requests of real programs --------------------------------------------------------------------


def fixture(name: str) -> tuple[ChatRequest, str]:
    recorded = json.loads((FIXTURES / f"{name}.json").read_text())
    body = json.dumps(recorded["body"], ensure_ascii=False).encode()
    request = dialect.decode(body, recorded["headers"], "/v1/messages")
    return request, caller(recorded["headers"], request).role


def test_claude_code() -> None:
    first, role = fixture("claude_code_turn1")
    second, _ = fixture("claude_code_turn2")
    assert role == "main"
    assert [m.role for m in first.messages] == ["system", "user", "user"]
    assert second.messages[:3] == first.messages  # append-only, although the wire's head and shapes moved
    answer, result = second.messages[3:]
    assert answer.reasoning == "A file is wanted: one shell command."
    assert answer.tool_calls[0].arguments == '{"command": "printf \'hé, %s:\\\\n\' \\"x\\" > hello.txt"}'
    assert answer.minted_ids == [f"rs_{CALL}", f"toolu_{CALL}_0"]
    assert result == Message(
        "tool",
        [TextPart("(Bash completed with no output)")],
        tool_call_id=f"toolu_{CALL}_0",
        minted_ids=[f"toolu_{CALL}_0"],
    )
    assert [t.name for t in second.tools] == ["Bash", "ToolSearch", "Write"]
    assert second.notes == [
        "dropped:billing_header",
        "moved:system_message",
        "withheld:DeferredToolPlaceholder",
    ]
    assert second.stream and not second.show_reasoning


def test_claude_code_web_search() -> None:
    request, role = fixture("claude_code_web_search")
    assert role == "auxiliary"
    assert (request.tools, request.tool_choice) == ([], ToolChoice())


def test_pi() -> None:
    request, role = fixture("pi_turn2")
    assert role == "main"
    assert [m.role for m in request.messages] == ["system", "user", "assistant", "tool"]
    assert request.messages[2].reasoning == "One command."
    assert [t.name for t in request.tools] == ["bash"]
    assert request.show_reasoning


def test_opencode_title() -> None:
    request, role = fixture("opencode_title")
    assert role == "auxiliary"
    assert len(request.messages[1].content) == 2
    assert request.tools == []


@pytest.mark.parametrize(
    ("headers", "role"),
    [
        ({}, "main"),
        ({"x-claude-code-request-class": "main"}, "main"),
        ({"X-Claude-Code-Request-Class": "subagent"}, "subagent"),
        ({"x-claude-code-request-class": "auxiliary", "x-claude-1p-request-class": "main"}, "auxiliary"),
        ({"x-claude-1p-request-class": "blocking-subagent"}, "subagent"),
        ({"x-claude-code-request-class": "something-new"}, "main"),
    ],
)
def test_role(headers: dict[str, str], role: str) -> None:
    assert caller(headers, decode()).role == role


PI = {"User-Agent": "pi (linux 6.1.0; x64)"}
OPENCODE = {"User-Agent": "opencode/1.18.33 ai-sdk/provider-utils/4.0.46 runtime/bun/1.3.14"}
OF_SUBAGENT = OPENCODE | {"x-session-id": "ses_2", "x-parent-session-id": "ses_1"}
SUMMARY = {"system": "You are a context summarization assistant. Summarise.", "tools": []}
TOOLS = {"tools": [{"name": "bash", "input_schema": {"type": "object"}}]}


@pytest.mark.parametrize(
    ("headers", "fields", "role"),
    [
        (PI, TOOLS, "main"),
        (PI, {}, "main"),  # `--no-tools`
        (PI, SUMMARY, "compaction"),
        (PI, SUMMARY | TOOLS, "main"),  # somebody's own system prompt
        (OPENCODE, TOOLS, "main"),
        (OPENCODE, {}, "auxiliary"),
        (OPENCODE, SUMMARY, "compaction"),
        (OF_SUBAGENT, TOOLS, "subagent"),
        (OF_SUBAGENT, SUMMARY, "compaction"),
        ({"x-parent-session-id": "ses_1"}, TOOLS, "main"),  # nobody that we know
        ({}, SUMMARY, "main"),
    ],
)
def test_role_of_those_who_do_not_say(headers: dict[str, str], fields: dict[str, Any], role: str) -> None:
    assert caller(headers, decode(**fields)).role == role
