"""Chat Completions requests to canonical ones."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.custom_tool import INPUT_SCHEMA
from polar_mitm.dialects.ids import minted
from polar_mitm.dialects.openai_chat import OpenAIChat
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.errors import PolarError
from polar_mitm.types import ChatRequest, ImagePart, Message, Sampling, TextPart, ToolCall, ToolChoice
from tests.dialects.wild import any_json

FIXTURES = Path(__file__).parents[2] / "fixtures" / "chat"
A, B = "01JD0Z6Q3W8F4M2N5P7R9T1V3X", "01JD0Z7A5Y9G6N3P8Q2S4W6Z8B"
DIALECT = OpenAIChat()


def decode(body: Any) -> ChatRequest:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return DIALECT.decode(data, {}, "/v1/chat/completions")


def ask(*messages: Any, **fields: Any) -> ChatRequest:
    return decode({"model": "m", "messages": list(messages), **fields})


def refused(body: Any) -> str:
    with pytest.raises(PolarError) as caught:
        decode(body)
    assert caught.value.kind == "bad_request"
    return caught.value.message


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def called(call_id: str, name: str = "f", arguments: str = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# --- whole requests of real shapes ----------------------------------------------------------------------


def test_it_is_registered():
    assert isinstance(DIALECTS["openai_chat"], OpenAIChat)


def test_qwen_code():
    request = decode((FIXTURES / "qwen_code.json").read_bytes())
    call_id = minted("call", A, 0)
    assert request.messages == [
        Message("system", [TextPart("You are an agent in a terminal.")]),
        Message(
            "user",
            [
                TextPart("<system-reminder>No skills are installed.</system-reminder>"),
                TextPart("<system-reminder>It is a Friday.</system-reminder>"),
                TextPart("Write the word hi into hello.txt."),
            ],
        ),
        Message(
            "assistant",
            [TextPart("I will write the file.")],
            "A file has to be written; one command does it.",
            [ToolCall(call_id, "run_shell_command", '{"command":"echo hi > hello.txt"}')],
            minted_ids=[call_id],
        ),
        Message(
            "tool", [TextPart("Output: (empty)\nExit Code: 0")], tool_call_id=call_id, minted_ids=[call_id]
        ),
    ]
    assert [t.name for t in request.tools] == ["run_shell_command", "write_file"]
    assert request.sampling == Sampling(max_tokens=64000)
    assert request.stream and request.stream_usage and request.show_reasoning
    assert request.notes == []


def test_opencode():
    request = decode((FIXTURES / "opencode.json").read_bytes())
    assert [m.role for m in request.messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert request.messages[2].reasoning == "One command will do."
    picture = request.messages[-1].content
    assert picture == [TextPart("What is in this picture?"), ImagePart("data:image/png;base64,iVBORw0KGgo=")]
    assert request.tools[0].parameters["properties"]["timeout"]["maximum"] == 9007199254740991
    assert request.sampling == Sampling(top_p=1.0, max_tokens=32000)


def test_pi_with_openrouter():
    request = decode((FIXTURES / "pi_openrouter.json").read_bytes())
    assert request.messages[0] == Message("system", [TextPart("You help in a workspace.")])
    both, patch = request.messages[2], request.messages[5]
    assert (both.reasoning, both.content) == ("Both at once.", [])
    assert both.minted_ids == [minted("call", A, 0), minted("call", A, 1)]
    assert patch.tool_calls == [
        ToolCall(minted("call", B, 0), "patch", "*** Begin Patch\n*** End Patch\n", "custom")
    ]
    tool = request.tools[1]
    assert (tool.kind, tool.grammar) == ("custom", "start: SOURCE\nSOURCE: /[\\s\\S]+/\n")
    assert tool.parameters == INPUT_SCHEMA and "must match this lark grammar" in tool.description
    assert request.sampling.max_tokens == 4096 and request.show_reasoning


def test_the_first_form_of_tools():
    request = decode((FIXTURES / "functions.json").read_bytes())
    _, _, call, result = request.messages
    assert call.tool_calls == [ToolCall("function_call_1", "weather", '{"city": "Ulm"}')]
    assert (result.role, result.text, result.tool_call_id) == ("tool", '{"sky":"grey"}', "function_call_1")
    assert [t.name for t in request.tools] == ["weather"]
    assert request.parallel_tool_calls is False, "its answer has room for one call"
    assert request.notes == ["dropped:message_name", "mapped:functions"]


# --- messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("a", [TextPart("a")]),
        ([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}], [TextPart("a")]),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": ""}], [TextPart("a")]),
        (None, []),
        ("", []),
        ([], []),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
def test_the_same_content_is_the_same_message(role: Any, content: Any, want: list[Any]):
    extra = {"tool_call_id": "c"} if role == "tool" else {}
    message = ask(user("x"), {"role": role, "content": content, **extra}).messages[1]
    assert message == Message(role, want, tool_call_id=extra.get("tool_call_id"))


def test_every_part_of_a_message():
    request = ask(
        user(
            [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ==", "detail": "low"}},
                {"type": "image_url", "image_url": "https://example.org/b.png"},
                {"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}},
                {"type": "file", "file": {"filename": "c.pdf", "file_data": "QQ=="}},
                {"type": "file", "file": {"file_id": "file_1"}},
                {"type": "video_url", "video_url": {"url": "https://example.org/d.mp4"}},
            ]
        )
    )
    assert request.messages[0].content == [
        TextPart("a"),
        ImagePart("data:image/png;base64,QQ=="),
        ImagePart("https://example.org/b.png"),
        TextPart("[input_audio]"),
        TextPart("[file: c.pdf]"),
        TextPart("[file]"),
        TextPart("[video_url]"),
    ]
    assert request.notes == ["placeholder:input_audio", "placeholder:file", "placeholder:video_url"]


def test_an_assistants_parts_are_one_text():
    content = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert ask(user("x"), {"role": "assistant", "content": content}).messages[1].content == [TextPart("ab")]
    refusal = {"role": "assistant", "content": None, "refusal": "I will not."}
    assert ask(user("x"), refusal).messages[1].text == "I will not."
    drawn = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    assert ask(user("x"), {"role": "assistant", "content": drawn}).messages[1].text == "[image]"
    spoken = ask(user("x"), {"role": "assistant", "audio": {"id": "audio_1"}})
    assert spoken.messages[1].text == "[audio]" and "placeholder:audio" in spoken.notes


def test_leading_system_and_developer_messages_are_one():
    request = ask(
        {"role": "system", "content": "one"},
        {"role": "developer", "content": [{"type": "text", "text": "two"}]},
        user("hi"),
    )
    assert [(m.role, m.text) for m in request.messages] == [("system", "one\n\ntwo"), ("user", "hi")]
    assert request.notes == []


@pytest.mark.parametrize("role", ["system", "developer"])
def test_later_system_messages_become_wrapped_user_messages(role: str):
    request = ask(user("hi"), {"role": role, "content": "careful"}, user("go"), {"role": role, "content": ""})
    assert [(m.role, m.text) for m in request.messages] == [
        ("user", "hi"), ("user", "<system>careful</system>"), ("user", "go"),
    ]  # fmt: skip
    assert request.notes == ["wrapped:system_message"]


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({"reasoning_content": "a"}, "a"),
        ({"reasoning": "b"}, "b"),
        ({"reasoning_content": "a", "reasoning": "a"}, "a"),
        ({"reasoning_content": "", "reasoning": "b"}, "b"),
        ({"reasoning_content": ""}, None),
        ({"reasoning_content": None, "reasoning": None}, None),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "a"}, {"text": "b", "index": 0}]}, "ab"),
        ({"reasoning_details": [{"type": "reasoning.summary", "summary": "a", "format": "unknown"}]}, "a"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, None),
        ({"reasoning": "a", "reasoning_details": [{"type": "reasoning.text", "text": "a"}]}, "a"),
        ({"reasoning_details": None}, None),
    ],
)
def test_reasoning_has_three_names(fields: dict[str, Any], reasoning: str | None):
    turn = ask(user("x"), {"role": "assistant", "content": "so", **fields}).messages[1]
    assert turn.reasoning == reasoning


def test_calls_keep_their_arguments_as_written():
    texts = ['{"a":1}', '{ "a" : 1.0 }', "", '{"a": ', "\\u00e9"]
    turn = ask(user("x"), {"role": "assistant", "tool_calls": [called("c", "f", t) for t in texts]})
    assert [c.arguments for c in turn.messages[1].tool_calls] == texts
    bare = {"id": "c", "function": {"name": "f"}}
    message = ask(user("x"), {"role": "assistant", "tool_calls": [bare]}).messages[1]
    assert message.tool_calls == [ToolCall("c", "f", "")] and message.minted_ids == []


def test_a_last_message_of_the_assistant_is_a_finished_turn():
    assert ask(user("x"), {"role": "assistant", "content": "{"}).notes == ["dropped:prefill"]


def test_several_function_calls_and_what_they_gave():
    def call(name: str) -> dict[str, Any]:
        return {"role": "assistant", "function_call": {"name": name, "arguments": "{}"}}

    def gave(name: str) -> dict[str, Any]:
        return {"role": "function", "name": name, "content": name}

    request = ask(user("x"), call("f"), gave("f"), call("g"), gave("g"))
    calls = [c.id for m in request.messages for c in m.tool_calls]
    assert [m.tool_call_id for m in request.messages if m.role == "tool"] == calls
    assert len(set(calls)) == 2 and request.notes == []


# --- tools ----------------------------------------------------------------------------------------------

F = {"type": "function", "function": {"name": "f"}}
G = {
    "type": "function",
    "function": {"name": "g", "description": "G", "strict": True, "parameters": {"a": 1}},
}
C = {"type": "custom", "custom": {"name": "c"}}


def tools(*tools: Any, **fields: Any) -> ChatRequest:
    return ask(user("go"), tools=list(tools), **fields)


def test_tools():
    request = tools(F, G, C)
    assert [(t.name, t.kind, t.namespace) for t in request.tools] == [
        ("f", "function", None), ("g", "function", None), ("c", "custom", None),
    ]  # fmt: skip
    assert request.tools[0].parameters == {"type": "object", "properties": {}}
    assert (request.tools[1].description, request.tools[1].parameters) == ("G", {"a": 1})
    assert request.tools[2].parameters == INPUT_SCHEMA and request.tools[2].grammar is None
    assert tools(F, parallel_tool_calls=False).parallel_tool_calls is False


def test_hosted_and_deferred_tools_are_withheld_with_a_note():
    request = tools({"type": "web_search"}, {**F, "defer_loading": True}, G)
    assert [t.name for t in request.tools] == ["g"]
    assert request.notes == ["withheld:web_search", "withheld:deferred_tool"]
    assert ask(user("x"), web_search_options={}).notes == ["withheld:web_search"]
    assert ask(user("x"), enable_search=True).notes == ["withheld:web_search"]
    assert ask(user("x"), modalities=["text", "audio"], audio={"voice": "a"}).notes == ["withheld:audio"]
    assert ask(user("x"), enable_search=False, modalities=["text"]).notes == []


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "f"}}, ToolChoice("tool", "f")),
        ({"type": "custom", "custom": {"name": "c"}}, ToolChoice("tool", "c")),
    ],
)
def test_tool_choice(choice: Any, want: ToolChoice):
    request = tools(F, G, C, tool_choice=choice)
    assert request.tool_choice == want and len(request.tools) == 3


def test_required_needs_a_tool():
    assert tools(tool_choice="required").tool_choice == ToolChoice()


@pytest.mark.parametrize(
    ("allowed", "mode", "names", "chosen"),
    [
        ([F], "required", ["f"], "required"),
        ([C, G], "auto", ["g", "c"], "auto"),
        ([{"type": "function"}, "odd"], "required", [], "auto"),
    ],
)
def test_allowed_tools_leave_only_those(allowed: list[Any], mode: str, names: list[str], chosen: str):
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
    request = tools(F, G, C, tool_choice=choice)
    assert [t.name for t in request.tools] == names
    assert request.tool_choice == ToolChoice(chosen)
    assert request.notes == ["filtered:allowed_tools"]


@pytest.mark.parametrize(
    ("choice", "want"),
    [(None, "auto"), ("auto", "auto"), ("none", "none"), ({"name": "f"}, "tool")],
)
def test_choices_of_the_first_form(choice: Any, want: str):
    request = ask(user("go"), functions=[{"name": "f"}], function_call=choice)
    assert request.tool_choice.mode == want
    assert request.tool_choice.name == ("f" if want == "tool" else None)


def test_tools_win_over_functions():
    request = tools(F, functions=[{"name": "old"}])
    assert [t.name for t in request.tools] == ["f"] and request.notes == []


# --- the rest of the request ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, Sampling()),
        ({"temperature": 0, "top_p": 0.5, "top_k": 20}, Sampling(0.0, 0.5, 20)),
        ({"top_k": -1}, Sampling(top_k=0)),
        ({"max_tokens": 5}, Sampling(max_tokens=5)),
        ({"max_tokens": 5, "max_completion_tokens": 6}, Sampling(max_tokens=6)),
        ({"stop": "END"}, Sampling(stop=["END"])),
        ({"stop": ["a", "", "b"]}, Sampling(stop=["a", "b"])),
        ({"stop": ""}, Sampling()),
        ({"stop": []}, Sampling()),
        ({"temperature": None, "max_tokens": None, "stop": None, "n": None, "stream": None}, Sampling()),
    ],
)
def test_sampling(fields: dict[str, Any], want: Sampling):
    assert ask(user("x"), **fields).sampling == want


def test_schemas():
    def schema(form: Any) -> Any:
        return ask(user("x"), response_format=form).response_schema

    own = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert schema({"type": "json_schema", "json_schema": {"name": "x", "schema": own, "strict": True}}) == own
    assert schema({"type": "json_object"}) == {"type": "object"}
    assert schema({"type": "text"}) is None and schema(None) is None


def test_answers_logprobs_and_streams():
    plain = ask(user("x"))
    assert (plain.n, plain.top_logprobs, plain.stream, plain.stream_usage) == (1, None, False, False)
    asked = ask(
        user("x"), n=3, logprobs=True, top_logprobs=5, stream=True, stream_options={"include_usage": True}
    )
    assert (asked.n, asked.top_logprobs, asked.stream, asked.stream_usage) == (3, 5, True, True)
    assert ask(user("x"), logprobs=True).top_logprobs == 0
    assert ask(user("x"), logprobs=False).top_logprobs is None
    assert ask(user("x"), stream=True, stream_options={"include_usage": False}).stream_usage is False


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, True),
        ({"enable_thinking": True, "preserve_thinking": True, "reasoning_effort": "low"}, True),
        ({"enable_thinking": False}, False),
        ({"include_reasoning": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"exclude": True}}, False),
        ({"reasoning": {"effort": "high", "exclude": False}}, True),
    ],
)
def test_whether_reasoning_is_shown(fields: dict[str, Any], shown: bool):
    assert ask(user("x"), **fields).show_reasoning is shown


def test_fields_that_say_nothing_to_a_local_model_change_nothing():
    volatile = {"user": "u", "metadata": {"a": "b"}, "store": True, "seed": 1, "service_tier": "auto"}
    volatile |= {"logit_bias": {"1": 2}, "verbosity": "low", "prompt_cache_key": "k", "prediction": {}}
    assert ask(user("x"), **volatile) == ask(user("x"))


# --- refusals -------------------------------------------------------------------------------------------

_TOOL = "tools[0]"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": 5}, "model"),
        ({"messages": []}, "messages: there is nothing"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"src": "x"}}])]},
            "messages[0].content[0].image_url",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]: Object missing required field"),
        ({"messages": [{"role": "assistant", "reasoning_content": []}]}, "messages[0].reasoning_content"),
        ({"messages": [{"role": "assistant", "reasoning_details": [5]}]}, "messages[0].reasoning_details"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]},
            "messages[0].tool_calls[0].func",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "custom"}]}]},
            "messages[0].tool_calls[0].custom",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [called("c", arguments={})]}]},  # type: ignore
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"tools": {}}, "tools"),
        ({"tools": [{"name": "f"}]}, _TOOL),
        ({"tools": [{"type": "function"}]}, f"{_TOOL}.function"),
        ({"tools": [{"type": "custom"}]}, f"{_TOOL}.custom"),
        ({"tools": [{"type": "function", "function": {}}]}, f"{_TOOL}.function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, f"{_TOOL}.function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": ""}}]}, f"{_TOOL}.custom.name"),
        ({"functions": [{"name": ""}]}, "functions[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, f"{_TOOL}.function"),
        (
            {"tools": [{"type": "custom", "custom": {"name": "c", "format": {"type": "grammar"}}}]},
            f"{_TOOL}.custom.format.grammar",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "absent"}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "absent"}}}, "tool_choice.custom.name"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "absent"}}, "function_call.name"),
        ({"functions": [{"name": "f"}], "function_call": "sometimes"}, "function_call"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"top_k": 0.5}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": [5]}, "stop[0]"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"reasoning": "much"}, "reasoning"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], field: str):
    assert refused({"model": "m", "messages": [user("hi")], **fields}).startswith(field)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "other": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "messages": [], "tool_choice": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_malformed_bodies(body: bytes):
    assert ": " in refused(body)


_KEYS = re.findall(
    r"\w+",
    "type role content text id name arguments input tool_calls tool_call_id function custom format grammar "
    "definition parameters image_url url refusal function_call reasoning_content reasoning audio file mode "
    "summary tools allowed_tools json_schema schema",
)
_WORDS = re.findall(
    r"\w+",
    "system developer user assistant tool function custom text image_url refusal grammar auto none required "
    "allowed_tools json_object json_schema web_search",
)
_WORDS += [minted("call", A, 0), ""]
_json = any_json(_KEYS, _WORDS)
_top = st.sampled_from(
    re.findall(
        r"\w+",
        "tools tool_choice functions function_call response_format stop n logprobs top_logprobs "
        "stream_options reasoning thinking chat_template_kwargs modalities max_tokens",
    )
)
_message = st.fixed_dictionaries(
    {"role": st.sampled_from(_WORDS[:6]), "tool_call_id": st.just("c")},
    optional={
        "content": _json,
        "tool_calls": _json,
        "function_call": _json,
        "reasoning": _json,
        "reasoning_details": _json,
    },
)


@given(_json, st.lists(_message, max_size=3), st.dictionaries(_top, _json, max_size=3))
def test_any_json_gives_a_request_or_a_bad_request(value: Any, messages: list[Any], fields: dict[str, Any]):
    head = {"model": "m", "messages": messages}
    for body in ({**head, **fields}, {**head, "messages": [value]}, value):
        try:
            request = decode(msgspec.json.encode(body))
        except PolarError as error:
            assert error.kind == "bad_request" and ": " in error.message
        else:
            assert request.messages and request.n >= 1


@given(st.binary(max_size=50))
def test_any_bytes_give_a_bad_request(body: bytes):
    refused(body)
