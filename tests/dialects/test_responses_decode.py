"""Responses requests to canonical ones."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.ids import minted, new_id, seal
from polar_mitm.dialects.openai_responses import OpenAIResponses
from polar_mitm.dialects.roles import caller
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, ImagePart, Message, Sampling, TextPart, ToolCall, ToolChoice
from tests.dialects.wild import any_json

FIXTURES = Path(__file__).parents[2] / "fixtures" / "responses"
A, B = "01JD0Z6Q3W8F4M2N5P7R9T1V3X", "01JD0Z7A5Y9G6N3P8Q2S4W6Z8B"
DIALECT = OpenAIResponses()


def decode(body: dict[str, Any] | bytes) -> ChatRequest:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return DIALECT.decode(data, {}, "/v1/responses")


def ask(*items: Any, **fields: Any) -> ChatRequest:
    return decode({"model": "m", "input": list(items), **fields})


def refused(body: dict[str, Any] | bytes) -> str:
    with pytest.raises(PolarError) as caught:
        decode(body)
    assert caught.value.kind == "bad_request"
    return caught.value.message


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# --- whole requests of real shapes ----------------------------------------------------------------------


def test_codex_lite():
    request = decode((FIXTURES / "codex_lite.json").read_bytes())
    assert [m.role for m in request.messages] == [
        "system", "user", "user", "assistant", "tool", "user", "assistant", "tool", "user",
    ]  # fmt: skip
    assert request.messages[0].text == (
        "You are an agent that shares a workspace with its user.\n\n<skills>No skills are installed.</skills>"
        "\n\n<permissions>You may write in the workspace.</permissions>"
    )
    turn = request.messages[3]
    assert turn.reasoning == "A file has to be written; one command does it."
    assert turn.text == "I will write the file."
    code = 'const r = await tools.exec_command({cmd: "echo hi > hello.txt"});\ntext(r);'
    assert turn.tool_calls == [ToolCall(minted("call", A, 0), "exec", code, "custom", "functions")]
    assert turn.minted_ids == [
        minted("rs", A, 0), minted("rs", A), minted("msg", A, 1), minted("ctc", A, 2), minted("call", A, 0),
    ]  # fmt: skip
    result = request.messages[4]
    assert result.tool_call_id == minted("call", A, 0)
    assert result.content == [TextPart("Script completed\n"), TextPart('{"exit_code":0,"output":""}')]
    assert result.minted_ids == [minted("call", A, 0)]
    assert request.messages[5].text == "<system><mode>Delegation is allowed from now on.</mode></system>"
    spawn = request.messages[6].tool_calls[0]
    assert (spawn.name, spawn.namespace, spawn.kind) == ("spawn_agent", "collaboration", "function")
    assert spawn.arguments == '{"task_name": "check", "message": "Read hello.txt"}'
    assert request.messages[8].text == (
        '<agent_message from="/root/check" to="/root">The file says hi.</agent_message>'
    )
    assert [t.engine_name for t in request.tools] == [
        "exec", "wait", "request_user_input", "clock__sleep", "collaboration__spawn_agent",
        "collaboration__list_agents",
    ]  # fmt: skip
    exec_tool = request.tools[0]
    assert exec_tool.kind == "custom" and exec_tool.namespace == "functions"
    assert exec_tool.grammar == "start: SOURCE\nSOURCE: /[\\s\\S]+/\n"
    assert (
        exec_tool.description.startswith("Run a script")
        and exec_tool.grammar.strip() in exec_tool.description
    )
    assert exec_tool.parameters["required"] == ["input"]
    assert exec_tool.parameters["properties"]["input"]["type"] == "string"
    assert (request.model, request.stream, request.parallel_tool_calls) == ("gpt-6.1-sol", True, False)
    assert not request.show_reasoning
    assert request.notes == ["dropped:namespace_description", "wrapped:system_message"]


def test_codex_classic():
    request = decode((FIXTURES / "codex_classic.json").read_bytes())
    assert request.messages[0].text == (
        "You are a coding agent in a terminal.\n\n<permissions>You may write in the workspace.</permissions>"
    )
    assert [m.role for m in request.messages] == [
        "system", "user", "user", "assistant", "tool", "tool", "assistant", "tool",
    ]  # fmt: skip
    first, second = request.messages[3], request.messages[6]
    assert first.reasoning == "Look at the picture first."
    assert [c.name for c in first.tool_calls] == ["view_image", "exec_command"]
    assert first.minted_ids == [minted("rs", A), minted("call", A, 0), minted("call", A, 1)]
    assert request.messages[4].content == [ImagePart("data:image/png;base64,iVBORw0KGgo=")]
    assert request.messages[5].text == "old line\n"
    assert second.tool_calls[0].kind == "custom"
    assert second.tool_calls[0].arguments.endswith("*** End Patch\n")
    assert [t.engine_name for t in request.tools] == [
        "exec_command", "write_stdin", "view_image", "apply_patch", "multi_agent_v1__spawn_agent",
    ]  # fmt: skip
    assert "withheld:web_search" in request.notes and "withheld:tool_search" in request.notes
    assert request.show_reasoning and request.parallel_tool_calls is True


def test_opencode():
    request = decode((FIXTURES / "opencode.json").read_bytes())
    assert [m.role for m in request.messages] == ["system", "user", "assistant", "tool"]
    turn = request.messages[2]
    assert (turn.reasoning, turn.text) == ("One command will do.", "Writing the file.")
    assert turn.tool_calls[0].arguments == '{"command":"echo hi > hello.txt","description":"Writes the file"}'
    assert request.sampling == Sampling(max_tokens=32000)
    assert request.tools[0].parameters["properties"]["timeout"]["maximum"] == 9007199254740991


def test_compaction_trigger_asks_for_a_summary_without_tools():
    request = decode((FIXTURES / "codex_compaction.json").read_bytes())
    assert request.messages[-1].role == "user" and "Summarise the conversation" in request.messages[-1].text
    assert request.tool_choice == ToolChoice("none")
    assert request.tools, "the tools stay: they are the head of the prompt"
    assert caller({}, request).role == "compaction"


def test_volatile_fields_change_nothing():
    body = json.loads((FIXTURES / "codex_lite.json").read_bytes())
    before = decode(body)
    body["client_metadata"] = {"turn_id": "another", "x-codex-ws-stream-request-start-ms": "1"}
    for item in body["input"]:
        if "internal_chat_message_metadata_passthrough" in item:
            item["internal_chat_message_metadata_passthrough"] = {"create_time": 1.5}
    assert decode(body) == before


# --- messages -------------------------------------------------------------------------------------------


def test_input_may_be_one_string():
    request = decode({"model": "m", "input": "hello"})
    assert request.messages == [Message("user", [TextPart("hello")])]
    assert not request.stream


def test_every_part_of_a_message():
    parts = [
        {"type": "input_text", "text": "a"},
        {"type": "input_image", "image_url": "data:image/png;base64,QQ==", "detail": "auto"},
        {"type": "input_image", "image_url": {"url": "https://example.org/b.png"}},
        {"type": "input_image", "file_id": "file_1"},
        {"type": "input_file", "filename": "c.pdf", "file_data": "data:application/pdf;base64,QQ=="},
        {"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}},
        {"type": "encrypted_content", "encrypted_content": "plain words of our own model"},
        {"type": "encrypted_content", "encrypted_content": seal(A, "sealed")},
        {"type": "text", "text": "d"},
    ]
    request = ask({"type": "message", "role": "user", "content": parts})
    assert request.messages[0].content == [
        TextPart("a"),
        ImagePart("data:image/png;base64,QQ=="),
        ImagePart("https://example.org/b.png"),
        TextPart("[input_image]"),
        TextPart("[input_file: c.pdf]"),
        TextPart("[input_audio]"),
        TextPart("plain words of our own model"),
        TextPart("sealed"),
        TextPart("d"),
    ]
    assert request.notes == ["placeholder:input_image", "placeholder:input_file", "placeholder:input_audio"]


def test_a_refusal_is_the_assistants_text():
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}
    assert ask(user("x"), refusal).messages[1] == Message("assistant", [TextPart("I will not.")])


def test_leading_system_and_developer_messages_merge_behind_the_instructions():
    request = ask(
        {"role": "system", "content": "two"},
        {"type": "additional_tools", "role": "developer", "tools": []},
        {"role": "developer", "content": [{"type": "input_text", "text": "three"}]},
        user("hi"),
        instructions="one",
    )
    assert [(m.role, m.text) for m in request.messages] == [("system", "one\n\ntwo\n\nthree"), ("user", "hi")]
    assert request.notes == []


@pytest.mark.parametrize("role", ["system", "developer"])
def test_later_system_messages_become_wrapped_user_messages(role: str):
    request = ask(user("hi"), {"role": role, "content": "careful"}, user("go"))
    assert [(m.role, m.text) for m in request.messages] == [
        ("user", "hi"),
        ("user", "<system>careful</system>"),
        ("user", "go"),
    ]
    assert request.notes == ["wrapped:system_message"]


def call(call_id: str, name: str = "f") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"}


def output(call_id: str, value: Any = "ok") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": value}


def test_items_of_one_turn_fold_and_a_turn_ends_where_somebody_else_speaks():
    request = ask(
        user("go"),
        {"type": "reasoning", "id": "rs_x", "summary": [{"type": "summary_text", "text": "why"}]},
        {"role": "assistant", "content": "first"},
        call("c1"),
        call("c2"),
        output("c1"),
        output("c2", [{"type": "input_text", "text": "two"}]),
        call("c3"),
    )
    assert request.messages == [
        Message("user", [TextPart("go")]),
        Message(
            "assistant",
            [TextPart("first")],
            "why",
            [ToolCall("c1", "f", "{}"), ToolCall("c2", "f", "{}")],
        ),
        Message("tool", [TextPart("ok")], tool_call_id="c1"),
        Message("tool", [TextPart("two")], tool_call_id="c2"),
        Message("assistant", tool_calls=[ToolCall("c3", "f", "{}")]),
    ]


def test_answers_of_two_calls_of_ours_are_two_turns():
    def said(call_id: str, text: str) -> dict[str, Any]:
        return {"role": "assistant", "id": minted("msg", call_id, 0), "content": text}

    request = ask(user("go"), said(A, "one"), said(B, "two"), call(minted("call", B, 0)))
    assert [(m.text, len(m.tool_calls)) for m in request.messages[1:]] == [("one", 0), ("two", 1)]


def test_text_that_we_split_around_a_call_is_one_text_again():
    def said(index: int, text: str) -> dict[str, Any]:
        return {"role": "assistant", "id": minted("msg", A, index), "content": text}

    turn = ask(user("go"), said(0, "one"), call(minted("call", A, 0)), said(2, " two")).messages[1]
    assert turn.content == [TextPart("one two")]


def test_reasoning_is_unsealed_or_read_from_its_summary_or_content():
    def reasoning(**fields: Any) -> Message:
        return ask(user("go"), {"type": "reasoning", **fields}).messages[1]

    parts = [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]
    sealed = reasoning(summary=parts, encrypted_content=seal(A, "all of it"), content=None)
    assert (sealed.reasoning, sealed.minted_ids) == ("all of it", [minted("rs", A)])
    assert reasoning(summary=parts, encrypted_content=seal(A)).reasoning == "a\n\nb"
    assert reasoning(summary=parts).reasoning == "a\n\nb"
    assert reasoning(summary=[], content=[{"type": "reasoning_text", "text": "c"}]).reasoning == "c"
    foreign = ask(user("go"), {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAAB"})
    assert foreign.messages[1].reasoning is None
    assert foreign.notes == ["dropped:encrypted_reasoning"]


def test_two_reasoning_items_of_a_turn():
    def reasoning(text: str, **fields: Any) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}], **fields}

    foreign = ask(user("go"), reasoning("a"), reasoning("b")).messages[1]
    assert foreign.reasoning == "a\n\nb"
    ours = [reasoning("", encrypted_content=seal(A, t)) for t in ("a", "b")]
    assert ask(user("go"), *ours).messages[1].reasoning == "ab"


@pytest.mark.parametrize("kind", ["web_search_call", "local_shell_call", "image_generation_call", "mcp_call"])
def test_hosted_calls_become_placeholders_in_the_turn(kind: str):
    item = {"type": kind, "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}}
    request = ask(user("go"), item, {"role": "assistant", "content": "found"})
    assert request.messages[1].content == [TextPart(f"[{kind}]"), TextPart("found")]
    assert request.notes == [f"placeholder:{kind}"]


def test_outputs_of_hosted_calls_end_the_turn():
    item = {"type": "local_shell_call_output", "id": "lso_1", "output": {"any": "shape"}}
    request = ask(user("go"), {"type": "local_shell_call"}, item)
    assert [(m.role, m.text) for m in request.messages[1:]] == [
        ("assistant", "[local_shell_call]"),
        ("user", "[local_shell_call_output]"),
    ]


def test_compaction_items_bring_their_summary_back():
    request = ask({"type": "compaction", "encrypted_content": seal(A, "We did half.")}, user("go on"))
    assert request.messages[0].role == "user"
    assert request.messages[0].text == "Summary of the conversation so far:\n\nWe did half."
    assert request.messages[0].minted_ids == [minted("msg", A)]
    foreign = ask({"type": "compaction_summary", "encrypted_content": "gAAAAAB"}, user("go on"))
    assert "cannot be read" in foreign.messages[0].text
    assert foreign.notes == ["placeholder:compaction"]


# --- tools ----------------------------------------------------------------------------------------------


def tools(*tools: Any, **fields: Any) -> ChatRequest:
    return ask(user("go"), tools=list(tools), **fields)


def test_function_tools_ignore_strict_and_may_lack_a_schema():
    request = tools(
        {"type": "function", "name": "f", "strict": True, "parameters": None},
        {"type": "function", "name": "g", "description": "G", "parameters": {"type": "object"}},
    )
    assert request.tools[0].parameters == {"type": "object", "properties": {}}
    assert (request.tools[1].description, request.tools[1].parameters) == ("G", {"type": "object"})


def test_custom_tools_with_and_without_a_grammar():
    regex = {"type": "grammar", "syntax": "regex", "definition": "[a-z]+"}
    request = tools(
        {"type": "custom", "name": "plain"},
        {"type": "custom", "name": "text", "description": "T", "format": {"type": "text"}},
        {"type": "custom", "name": "strict", "description": "S", "format": regex},
    )
    assert [t.kind for t in request.tools] == ["custom"] * 3
    assert [t.grammar for t in request.tools] == [None, None, "[a-z]+"]
    assert [t.description for t in request.tools] == [
        "", "T", "S\n\nThe input must match this regex grammar:\n[a-z]+",
    ]  # fmt: skip
    assert all(t.parameters["required"] == ["input"] for t in request.tools)


def test_namespaces_nest_and_flatten_for_the_engine():
    inner = {"type": "namespace", "name": "in", "tools": [{"type": "function", "name": "f"}]}
    request = tools(
        {"type": "namespace", "name": "out", "description": "about", "tools": [inner]},
        {"type": "namespace", "name": "functions", "tools": [{"type": "custom", "name": "f"}]},
    )
    assert [(t.namespace, t.name, t.engine_name) for t in request.tools] == [
        ("out__in", "f", "out__in__f"),
        ("functions", "f", "f"),
    ]
    assert request.notes == ["dropped:namespace_description"]


@pytest.mark.parametrize(
    "kind", ["web_search", "tool_search", "file_search", "local_shell", "image_generation"]
)
def test_hosted_tools_are_withheld_with_a_note(kind: str):
    request = tools({"type": kind, "description": None}, {"type": "function", "name": "f"})
    assert [t.name for t in request.tools] == ["f"]
    assert request.notes == [f"withheld:{kind}"]


def test_deferred_tools_are_withheld():
    request = tools({"type": "function", "name": "f", "defer_loading": True})
    assert request.tools == [] and request.notes == ["withheld:deferred_tool"]


def test_a_later_tool_of_the_same_name_replaces_the_earlier():
    later = {"type": "additional_tools", "tools": [{"type": "function", "name": "f", "description": "new"}]}
    request = ask(later, user("go"), tools=[{"type": "function", "name": "f", "description": "old"}])
    assert [t.description for t in request.tools] == ["new"]


F, C = {"type": "function", "name": "f"}, {"type": "custom", "name": "c"}
NS = {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g"}]}


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "f"}, ToolChoice("tool", "f")),
        ({"type": "custom", "name": "c"}, ToolChoice("tool", "c")),
        ({"type": "function", "name": "g"}, ToolChoice("tool", "n__g")),
        ({"type": "function", "name": "g", "namespace": "n"}, ToolChoice("tool", "n__g")),
    ],
)
def test_tool_choice(choice: Any, want: ToolChoice):
    request = tools(F, C, NS, tool_choice=choice)
    assert request.tool_choice == want and len(request.tools) == 3


@pytest.mark.parametrize(
    ("allowed", "mode", "names", "chosen"),
    [
        ([F], "required", ["f"], "required"),
        ([C, {"type": "namespace", "name": "n"}], "auto", ["c", "g"], "auto"),
        ([{"type": "web_search"}, "odd"], "required", [], "auto"),
    ],
)
def test_allowed_tools_leave_only_those(allowed: list[Any], mode: str, names: list[str], chosen: str):
    request = tools(F, C, NS, tool_choice={"type": "allowed_tools", "mode": mode, "tools": allowed})
    assert [t.name for t in request.tools] == names
    assert request.tool_choice == ToolChoice(chosen)
    assert request.notes == ["filtered:allowed_tools"]


def test_a_forced_hosted_tool_is_withheld_and_required_needs_a_tool():
    assert tools(F, tool_choice={"type": "web_search"}).notes == ["withheld:web_search"]
    assert tools(tool_choice="required").tool_choice == ToolChoice()


# --- the rest of the request ----------------------------------------------------------------------------


def test_sampling_schema_and_reasoning():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    request = ask(
        user("go"),
        max_output_tokens=100,
        temperature=1,
        top_p=0.5,
        text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        parallel_tool_calls=False,
        stream=True,
    )
    assert request.sampling == Sampling(1.0, 0.5, max_tokens=100)
    assert request.response_schema == schema
    assert request.show_reasoning and request.stream and request.parallel_tool_calls is False
    plain = ask(
        user("go"), text={"format": {"type": "text"}, "verbosity": "low"}, reasoning={"summary": None}
    )
    assert plain.response_schema is None and not plain.show_reasoning
    assert ask(user("go"), text={"format": {"type": "json_object"}}).response_schema == {"type": "object"}


@pytest.mark.parametrize(
    ("headers", "role"),
    [
        ({}, "main"),
        ({"X-OpenAI-Subagent": "review"}, "subagent"),
        ({"x-openai-subagent": "collab_spawn"}, "subagent"),
        ({"x-openai-subagent": "false"}, "main"),
        ({"x-openai-subagent": "compact"}, "compaction"),
        ({"x-openai-subagent": "memory_consolidation"}, "auxiliary"),
        ({"x-openai-memgen-request": "true"}, "auxiliary"),
    ],
)
def test_role_is_read_from_codex_headers(headers: dict[str, str], role: str):
    assert caller(headers, ask(user("go"))).role == role


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": 5}, "model"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input[0].content"),
        ({"input": ["x", {"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0]"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]},
            "input[0].arg",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": {}}]}, "input[0].output"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f"}]}, "input[0]: Object missing"),
        (
            {"input": [{"type": "additional_tools", "tools": [{"type": "function"}]}]},
            "input[0].tools[0].name",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]: no items are kept"),
        ({"input": [{"id": "msg_1"}]}, "input[0]: no items are kept"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: no state is kept"),
        ({"conversation": {"id": "conv_1"}}, "conversation: no state is kept"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt: no state is kept"),
        ({"background": True}, "background: no state is kept"),
        ({"instructions": 5}, "instructions"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"name": "f"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools[0].parameters"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]},
            "tools[0].tools[0].name",
        ),
        ({"tools": [{"type": "custom", "name": "c", "format": {"type": "grammar"}}]}, "tools[0].format.def"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "absent"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "odd", "tools": []}}, "tool_choice"),
        ({"max_output_tokens": "many"}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stream": "yes"}, "stream"),
        ({"reasoning": "much"}, "reasoning"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], field: str):
    assert refused({"model": "m", "input": "hi", **fields}).startswith(field)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "m", "input": ["\xff"]}',
        b'{"model": "m", "input": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "m", "input": "\\ud800"}',
        b'{"model": "m", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "input": "x", "other": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_malformed_bodies(body: bytes):
    assert ": " in refused(body)


_KEYS = re.findall(
    r"\w+",
    "type role content text id call_id name arguments input output summary encrypted_content tools namespace "
    "format parameters image_url definition",
)
_WORDS = re.findall(
    r"\w+",
    "message user assistant developer reasoning function_call custom_tool_call function_call_output function "
    "custom_tool_call_output additional_tools compaction compaction_trigger agent_message namespace custom "
    "input_text input_image encrypted_content grammar web_search_call",
)
_WORDS += [seal(new_id(), "x"), ""]
_json = any_json(_KEYS, _WORDS)
_top = st.sampled_from(
    re.findall(
        r"\w+",
        "tools tool_choice instructions text reasoning max_output_tokens stream store metadata "
        "truncation user",
    )
)


@given(_json, st.dictionaries(_top, _json, max_size=3))
def test_any_json_gives_a_request_or_a_bad_request(value: Any, fields: dict[str, Any]):
    for body in ({"model": "m", "input": value, **fields}, {"model": "m", "input": [value]}, value):
        try:
            request = decode(msgspec.json.encode(body))
        except PolarError as error:
            assert error.kind == "bad_request"
        else:
            assert request.messages


@given(st.binary(max_size=50))
def test_any_bytes_give_a_bad_request(body: bytes):
    refused(body)


def test_logprobs_are_shown_to_who_includes_them():
    shown = ["reasoning.encrypted_content", "message.output_text.logprobs"]
    asked = [{}, {"top_logprobs": 3}, {"include": shown}, {"include": shown, "top_logprobs": 3}]
    bodies = (json.dumps({"model": "m", "input": "hi", **fields}).encode() for fields in asked)
    assert [DIALECT.decode(body, {}, "/v1/responses").top_logprobs for body in bodies] == [None, None, 0, 3]
