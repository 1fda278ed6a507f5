"""Gemini requests to canonical: one test per rule of the translation."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.gemini import Gemini
from polar_mitm.dialects.gemini_schema import json_schema
from polar_mitm.dialects.ids import call_id_of, seal
from polar_mitm.errors import PolarError
from polar_mitm.lineage import Lineage
from polar_mitm.types import (
    ChatRequest,
    ImagePart,
    Message,
    ModelCall,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "gemini"
PATH = "/v1beta/models/gemini-x:generateContent"
CALL = "01JD0Z6Q3W8F4M2N5P7R9T1V3X"
OTHER = "01JD0Z6Q3W8F4M2N5P7R9T1V40"
dialect = Gemini()


def decode(path: str = PATH, **fields: Any) -> ChatRequest:
    body = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}], **fields}
    return dialect.decode(json.dumps(body).encode(), {}, path)


def contents(*turns: tuple[str, list[Any]]) -> list[Message]:
    return decode(contents=[{"role": role, "parts": parts} for role, parts in turns]).messages


def refusal(body: bytes, path: str = PATH) -> str:
    with pytest.raises(PolarError) as caught:
        dialect.decode(body, {}, path)
    assert caught.value.kind == "bad_request"
    return caught.value.message


def refused(**fields: Any) -> str:
    body = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}], **fields}
    return refusal(json.dumps(body).encode())


def signature(call_id: str = CALL, text: str | None = None, urlsafe: bool = False) -> str:
    encode = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    return encode(seal(call_id, text).encode()).decode()


def called(name: str, args: Any = None, **more: Any) -> dict[str, Any]:
    return {"functionCall": {"name": name, "args": args or {}, **more}}


def responded(name: str, response: Any, **more: Any) -> dict[str, Any]:
    return {"functionResponse": {"name": name, "response": response, **more}}


def fixture(name: str) -> ChatRequest:
    call = json.loads((FIXTURES / f"{name}.json").read_text())
    return dialect.decode(
        json.dumps(call["body"], ensure_ascii=False).encode(), call["headers"], call["path"]
    )


# --- the path -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v1beta", "v1alpha"])
@pytest.mark.parametrize(
    ("method", "stream", "array"),
    [
        ("generateContent", False, False),
        ("generateContent?alt=sse", False, False),
        ("streamGenerateContent?alt=sse", True, False),
        ("streamGenerateContent?key=none&$alt=sse", True, False),
        ("streamGenerateContent?%24alt=sse", True, False),
        ("streamGenerateContent", True, True),
        ("streamGenerateContent?alt=json&key=none", True, True),
    ],
)
def test_the_path_says_model_and_stream(version: str, method: str, stream: bool, array: bool) -> None:
    request = decode(f"/{version}/models/gemini-2.5%2Dpro:{method}")
    assert (request.model, request.stream) == ("gemini-2.5-pro", stream)
    assert request.notes == (["framed:json_array"] if array else [])


def test_a_path_without_a_method() -> None:
    assert "no model" in refusal(b"{}", "/v1beta/models/gemini-x")


# --- names ----------------------------------------------------------------------------------------------

_FULL: dict[str, Any] = {
    "systemInstruction": {"parts": [{"text": "be brief"}]},
    "contents": [
        {
            "role": "user",
            "parts": [{"text": "hi"}, {"inlineData": {"mimeType": "image/png", "data": "aGk="}}],
        },
        {
            "role": "model",
            "parts": [
                {"text": "hm", "thought": True},
                {
                    "functionCall": {
                        "name": "f",
                        "args": {"inline_data": 1.0, "top_k": {"file_data": [1e2]}},
                    },
                    "thoughtSignature": signature(),
                },
            ],
        },
        {
            "role": "user",
            "parts": [
                {
                    "functionResponse": {
                        "name": "f",
                        "response": {"mime_type": "kept"},
                        "parts": [{"inlineData": {"mimeType": "image/gif", "data": "aGk="}}],
                    }
                },
                {"fileData": {"fileUri": "gs://a/b", "mimeType": "video/mp4"}},
                {"executableCode": {"language": "PYTHON", "code": "1"}},
                {"codeExecutionResult": {"outcome": "OUTCOME_OK"}},
            ],
        },
    ],
    "tools": [
        {
            "functionDeclarations": [
                {"name": "f", "parametersJsonSchema": {"type": "object", "properties": {"inline_data": {}}}},
                {"name": "g", "parameters": {"type": "OBJECT", "properties": {"top_k": {"type": "STRING"}}}},
            ]
        },
        {"googleSearch": {}},
    ],
    "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
    "generationConfig": {
        "topP": 0.5,
        "topK": 3,
        "maxOutputTokens": 9,
        "stopSequences": ["x"],
        "candidateCount": 2,
        "responseLogprobs": True,
        "logprobs": 4,
        "responseMimeType": "application/json",
        "responseSchema": {"type": "OBJECT", "properties": {"mime_type": {"type": "STRING"}}},
        "thinkingConfig": {"includeThoughts": True},
    },
}
_KEPT = ("args", "response", "properties")  # what is not the API's own


def snake(value: Any) -> Any:
    if isinstance(value, list):
        return [snake(v) for v in value]
    if not isinstance(value, dict):
        return value
    return {
        re.sub("[A-Z]", lambda m: "_" + m[0].lower(), k): v if k in _KEPT else snake(v)
        for k, v in value.items()
    }


def test_both_spellings_of_every_name_mean_the_same() -> None:
    camel = decode(**_FULL)
    body = json.dumps(snake(_FULL)).encode()
    assert b"functionCall" not in body and b"Config" not in body
    assert dialect.decode(body, {}, PATH) == camel
    mixed = {**_FULL, "system_instruction": snake(_FULL["systemInstruction"])}
    del mixed["systemInstruction"]
    assert dialect.decode(json.dumps(mixed).encode(), {}, PATH) == camel
    assert (
        camel.messages[2].tool_calls[0].arguments == '{"inline_data": 1.0, "top_k": {"file_data": [100.0]}}'
    )
    assert camel.messages[3].text == '{"mime_type": "kept"}'
    assert camel.notes == [
        "placeholder:file_data",
        "placeholder:executable_code",
        "placeholder:code_execution_result",
        "withheld:google_search",
    ]


def test_what_the_api_s_own_examples_leave_out() -> None:
    """One element for an array of one, and no role."""
    body = {
        "contents": {"parts": {"text": "hi"}},
        "system_instruction": {"parts": {"text": "be brief"}},
        "tools": {"function_declarations": {"name": "f"}},
    }
    request = dialect.decode(json.dumps(body).encode(), {}, PATH)
    assert [(m.role, m.text) for m in request.messages] == [("system", "be brief"), ("user", "hi")]
    assert request.tools == [Tool("f", "", {"type": "object", "properties": {}})]


def test_numbers_may_be_strings() -> None:
    config = {
        "temperature": "0.5",
        "topP": 0.25,
        "topK": 40.0,
        "maxOutputTokens": "7",
        "stopSequences": ["a"],
    }
    assert decode(generationConfig=config).sampling == Sampling(0.5, 0.25, 40, 7, ["a"])


# --- contents -------------------------------------------------------------------------------------------


def test_system_parts_become_one_leading_message() -> None:
    request = decode(systemInstruction={"parts": [{"text": "a"}, {"text": ""}, {"text": "b"}]})
    assert request.messages[0] == Message("system", [TextPart("a\n\nb")])


def test_an_unknown_role() -> None:
    assert "contents[0].role" in refused(contents=[{"role": "system", "parts": [{"text": "x"}]}])


@pytest.mark.parametrize("data", ["+/+/", "-_-_"])
def test_images_in_either_base64_alphabet(data: str) -> None:
    (message,) = contents(("user", [{"inlineData": {"mimeType": "image/jpeg", "data": data}}]))
    assert message.content == [ImagePart("data:image/jpeg;base64,+/+/")]


def test_what_a_local_model_cannot_read_is_named() -> None:
    parts: list[Any] = [
        {"inlineData": {"mimeType": "application/pdf", "data": "aGk="}},
        {"fileData": {"fileUri": "https://a/b.mp4"}},
        {"somethingNew": {}},
    ]
    request = decode(contents=[{"role": "user", "parts": parts}])
    assert request.messages[0].content == [
        TextPart("[inline_data of type application/pdf left out]"),
        TextPart("[file_data: https://a/b.mp4 left out]"),
        TextPart("[part left out]"),
    ]
    assert request.notes == ["placeholder:inline_data", "placeholder:file_data", "placeholder:part"]


def test_responses_of_functions_come_first_and_are_matched() -> None:
    messages = contents(
        ("user", [{"text": "hi"}]),
        ("model", [called("f", id="a"), called("g"), called("f")]),
        ("function", [responded("f", {"output": "one"}, id="a"), responded("g", {"error": "no"})]),
        ("user", [{"text": "and"}, responded("f", {"output": {"x": 1}})]),
    )
    assert [c.id for c in messages[1].tool_calls] == ["a", "call_1", "call_2"]
    assert [(m.role, m.text, m.tool_call_id) for m in messages[2:]] == [
        ("tool", "one", "a"),
        ("tool", "Error:no", "call_1"),
        ("tool", '{"x": 1}', "call_2"),
        ("user", "and", None),
    ]


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ({"output": "as it\nstands"}, "as it\nstands"),
        ({"result": "x"}, '{"result": "x"}'),
        ({"output": "x", "more": 1}, '{"output": "x", "more": 1}'),
        ({"output": [1, 2]}, "[1, 2]"),
        ({}, "{}"),
        (None, ""),
    ],
)
def test_what_a_function_gave_back(response: Any, text: str) -> None:
    (message,) = contents(("user", [responded("f", response)]))
    assert (message.role, message.text) == ("tool", text)


def test_a_function_may_give_an_image_back() -> None:
    image = {"inlineData": {"mimeType": "image/png", "data": "aGk="}}
    (message,) = contents(("user", [responded("f", {"output": "see"}, parts=[image])]))
    assert message.content == [TextPart("see"), ImagePart("data:image/png;base64,aGk=")]


# --- the model's turns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("urlsafe", [False, True])
def test_a_seal_gives_the_thoughts_back(urlsafe: bool) -> None:
    """SDKs write the bytes of a signature in their own alphabet of base64."""
    text = "thought?" * 20 + "ÿþ~~~"
    said = {"text": "so", "thoughtSignature": signature(text=text, urlsafe=urlsafe)}
    for shown in ([], [{"text": "shown otherwise", "thought": True}]):
        (message,) = contents(("model", [*shown, said]))
        assert (message.reasoning, message.text, message.minted_ids) == (text, "so", [f"rs_{CALL}"])


def test_thoughts_without_a_seal_are_what_is_shown() -> None:
    (message,) = contents(
        ("model", [{"text": "hm ", "thought": True}, {"text": "so", "thoughtSignature": "SFhU"}])
    )
    assert (message.reasoning, message.text, message.minted_ids) == ("hm ", "so", [])


@pytest.mark.parametrize("blob", ["skip_thought_signature_validator", "", "%%", "cG9sYXI=", "cG9sYXJ4eHh4"])
def test_a_signature_of_somebody_else(blob: str) -> None:
    (message,) = contents(("model", [{"text": "so", "thoughtSignature": blob}]))
    assert message == Message("assistant", [TextPart("so")])


def test_chunks_of_one_answer_are_one_message() -> None:
    messages = contents(
        ("model", [{"text": "hm", "thought": True}]),
        ("model", [{"text": "one ", "thoughtSignature": signature(text="hm")}]),
        ("model", [{"text": "two"}]),
        ("model", [{"text": ""}, {"thoughtSignature": signature()}]),
        ("model", [called("f"), called("g")]),
        ("user", [responded("g", {}), responded("f", {})]),
    )
    assert messages[0] == Message(
        "assistant",
        [TextPart("one two")],
        "hm",
        [ToolCall(f"call_{CALL}_0", "f", "{}"), ToolCall(f"call_{CALL}_1", "g", "{}")],
        minted_ids=[f"rs_{CALL}", f"call_{CALL}_0", f"call_{CALL}_1"],
    )
    assert [m.tool_call_id for m in messages[1:]] == [f"call_{CALL}_1", f"call_{CALL}_0"]


def test_answers_of_two_calls_are_two_messages() -> None:
    messages = contents(
        ("model", [{"text": "a", "thoughtSignature": signature(text="x")}]),
        ("model", [{"text": "b", "thoughtSignature": signature(OTHER)}]),
    )
    assert [(m.text, m.reasoning) for m in messages] == [("a", "x"), ("b", None)]


def test_gemini_cli_puts_the_name_before_an_id() -> None:
    messages = contents(
        ("model", [called("ls", id=f"ls__call_{CALL}_0"), called("ls", id="ls__foreign")]),
        ("user", [responded("ls", {"output": "x"}, id=f"ls__call_{CALL}_0")]),
    )
    assert [c.id for c in messages[0].tool_calls] == [f"call_{CALL}_0", "ls__foreign"]
    assert messages[1].tool_call_id == f"call_{CALL}_0"
    assert messages[1].minted_ids == [f"call_{CALL}_0"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_arguments_are_written_as_chat_templates_write_them(value: Any) -> None:
    args = {"a": value, "b": 1}
    compact = json.dumps(args, separators=(",", ":"), ensure_ascii=False)
    head = '{"contents":[{"role":"model","parts":[{"functionCall":{"name":"f","args":'
    body = head + compact + "}}]}]}"
    (call,) = dialect.decode(body.encode(), {}, PATH).messages[0].tool_calls
    assert call.arguments == json.dumps(args, ensure_ascii=False)


# --- tools ----------------------------------------------------------------------------------------------

_TOOLS = [{"functionDeclarations": [{"name": name} for name in "fgh"]}]


def choose(tools: Any = None, **config: Any) -> tuple[ToolChoice, str, list[str]]:
    request = decode(tools=_TOOLS if tools is None else tools, toolConfig={"functionCallingConfig": config})
    return request.tool_choice, "".join(t.name for t in request.tools), request.notes


@pytest.mark.parametrize(
    ("config", "choice", "offered"),
    [
        ({}, ToolChoice(), "fgh"),
        ({"mode": "AUTO"}, ToolChoice(), "fgh"),
        ({"mode": "MODE_UNSPECIFIED"}, ToolChoice(), "fgh"),
        ({"mode": "NONE"}, ToolChoice("none"), "fgh"),
        ({"mode": "ANY"}, ToolChoice("required"), "fgh"),
        ({"mode": "ANY", "allowedFunctionNames": ["g"]}, ToolChoice("tool", "g"), "fgh"),
        ({"mode": "ANY", "allowedFunctionNames": ["h", "f"]}, ToolChoice("required"), "fh"),
        ({"mode": "VALIDATED"}, ToolChoice(), "fgh"),
        ({"mode": "VALIDATED", "allowedFunctionNames": ["g"]}, ToolChoice(), "g"),
    ],
)
def test_tool_config(config: Any, choice: ToolChoice, offered: str) -> None:
    notes = [] if offered == "fgh" else ["filtered:allowed_tools"]
    assert choose(**config) == (choice, offered, notes)


def test_tools_of_the_provider_are_withheld() -> None:
    tools = [{"googleSearch": {}}, {"codeExecution": {}, "urlContext": {}}, {"google_search_retrieval": {}}]
    notes = ["google_search", "code_execution", "url_context", "google_search_retrieval"]
    withheld = [f"withheld:{name}" for name in notes]
    assert choose(tools) == (ToolChoice(), "", withheld)
    assert choose(tools, mode="ANY") == (ToolChoice(), "", [*withheld, "dropped:tool_choice"])


def test_a_later_declaration_replaces_an_earlier() -> None:
    tools = [*_TOOLS, {"functionDeclarations": [{"name": "g", "description": "new"}]}]
    assert [(t.name, t.description) for t in decode(tools=tools).tools] == [
        ("f", ""),
        ("g", "new"),
        ("h", ""),
    ]


# --- schemas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"format": "enum", "enum": ["A", "STRING"]}, {"enum": ["A", "STRING"]}),
        ({"type": "INTEGER", "format": "int32", "minimum": 1}, {"type": "integer", "minimum": 1}),
        ({"type": "STRING", "format": "date-time"}, {"type": "string", "format": "date-time"}),
        ({"type": "NUMBER", "nullable": True}, {"type": ["number", "null"]}),
        ({"type": "STRING", "nullable": False}, {"type": "string"}),
        (
            {"type": "STRING", "enum": ["a"], "nullable": True},
            {"type": ["string", "null"], "enum": ["a", None]},
        ),
        (
            {"any_of": [{"type": "STRING"}, {"type": "NULL"}], "nullable": True},
            {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "null"}]},
        ),
        (
            {"type": "ARRAY", "items": {"type": "BOOLEAN"}, "minItems": "2", "max_items": 3},
            {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        ),
        ({"type": "TYPE_UNSPECIFIED"}, {}),
        (
            {"properties": {"type": {"type": "STRING"}, "any_of": {"type": "OBJECT"}}},
            {"properties": {"type": {"type": "string"}, "any_of": {"type": "object"}}},
        ),
        (
            {"$defs": {"X": {"type": "OBJECT"}}, "oneOf": [{"$ref": "#/$defs/X"}]},
            {"$defs": {"X": {"type": "object"}}, "oneOf": [{"$ref": "#/$defs/X"}]},
        ),
        ({"default": {"type": "STRING"}}, {"default": {"type": "STRING"}}),
        ({"type": ["STRING", "NULL"], "not": False}, {"type": ["string", "null"], "not": False}),
    ],
)
def test_schemas(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert json_schema(schema) == expected
    assert json_schema(expected) == expected  # a JSON schema stays what it is
    assert json.dumps(schema) == before


def test_properties_come_in_their_ordering() -> None:
    properties = {name: {"type": "STRING"} for name in "abcd"}
    schema = json_schema({"properties": properties, "propertyOrdering": ["c", "a", "x"]})
    assert list(schema) == ["properties"] and list(schema["properties"]) == ["c", "a", "b", "d"]


def test_parameters_in_either_form() -> None:
    upper = {"type": "OBJECT", "properties": {"a": {"type": "INTEGER"}}}
    lower = {"type": "object", "properties": {"a": {"type": "integer"}}}
    declared = [{"name": "f", "parameters": upper}, {"name": "g", "parametersJsonSchema": lower}]
    assert [t.parameters for t in decode(tools=[{"functionDeclarations": declared}]).tools] == [lower, lower]


# --- generation config ----------------------------------------------------------------------------------


def test_structured_output() -> None:
    upper, lower = {"type": "OBJECT"}, {"type": "object"}
    for config in (
        {"responseMimeType": "application/json", "responseSchema": upper},
        {"responseMimeType": "application/json", "responseJsonSchema": upper},
        {"responseJsonSchema": lower},
    ):
        assert decode(generationConfig=config).response_schema == lower
    assert decode(generationConfig={"responseMimeType": "text/plain"}).response_schema is None
    free = decode(generationConfig={"responseMimeType": "application/json"}).response_schema
    assert free == {"anyOf": [{"type": "object"}, {"type": "array"}]}


def test_several_answers_and_logprobs() -> None:
    assert (decode().n, decode().top_logprobs) == (1, None)
    assert decode(generationConfig={"candidateCount": 3}).n == 3
    for config, shown in (
        ({"responseLogprobs": True}, 0),
        ({"responseLogprobs": True, "logprobs": 5}, 5),
        ({"responseLogprobs": False, "logprobs": 5}, None),
    ):
        assert decode(generationConfig=config).top_logprobs == shown


def test_thoughts_are_shown_on_demand() -> None:
    assert not decode().show_reasoning
    assert not decode(generationConfig={"thinkingConfig": {"thinkingBudget": 9}}).show_reasoning
    assert decode(generationConfig={"thinkingConfig": {"includeThoughts": True}}).show_reasoning


# --- bad requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"contents": []}, "contents"),
        ({"contents": "hi"}, "contents"),
        ({"contents": [{"parts": [{"text": 5}]}]}, "contents[0].parts[0].text"),
        ({"contents": [{"parts": [{"text": 5}]}], "system_instruction": {}}, "contents[0].parts[0].text"),
        ({"contents": [{"role": "model", "parts": [called("f", [1])]}]}, "contents[0].parts[0].functionCall"),
        ({"contents": [{"parts": [responded("f", "text")]}]}, "contents[0].parts[0].functionResponse"),
        (
            {"tools": [{"functionDeclarations": [{"description": "x"}]}]},
            "tools[0].functionDeclarations[0].name",
        ),
        ({"tools": [{"functionDeclarations": [{"name": 5}]}]}, "tools[0].functionDeclarations[0].name"),
        (
            {"toolConfig": {"functionCallingConfig": {"mode": "SOME"}}},
            "toolConfig.functionCallingConfig.mode",
        ),
        (
            {"toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["x"]}}},
            "allowedFunctionNames",
        ),
        ({"generationConfig": {"temperature": 3}}, "generationConfig.temperature"),
        ({"generationConfig": {"temperature": "NaN"}}, "generationConfig.temperature"),
        ({"generationConfig": {"candidateCount": 0}}, "generationConfig.candidateCount"),
        ({"generationConfig": {"maxOutputTokens": -1}}, "generationConfig.maxOutputTokens"),
        ({"generationConfig": {"responseJsonSchema": 5}}, "generationConfig.responseJsonSchema"),
        ({"generationConfig": {"responseMimeType": "image/png"}}, "generationConfig.responseMimeType"),
        ({"generationConfig": {"responseMimeType": "text/x.enum"}}, "generationConfig.responseSchema.enum"),
        ({"cachedContent": "cachedContents/x"}, "cachedContent"),
    ],
)
def test_a_bad_request_names_the_field(fields: dict[str, Any], named: str) -> None:
    assert named in refused(**fields)


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b'{"contents":', b"\xff", b'"x"', b"null"])
def test_a_body_that_is_no_request(body: bytes) -> None:
    assert refusal(body)


@pytest.mark.parametrize("key", ["responseSchema", "response_schema"])
def test_a_bottomless_body(key: str) -> None:
    schema = '{"items":' * 100_000 + "{}" + "}" * 100_000
    config = '"generationConfig":{"' + key + '":' + schema + "}"
    assert "deep" in refusal(b'{"contents":[{"parts":[{"text":"x"}]}],' + config.encode() + b"}")


_keys = "contents parts text role tools function_call functionCall args functionResponse generationConfig"
_json = st.recursive(
    st.none() | st.text(max_size=3) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_keys.split()), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.binary(max_size=80) | _json.map(lambda value: json.dumps(value).encode()))
def test_any_body_decodes_or_is_refused(body: bytes) -> None:
    try:
        request = dialect.decode(body, {}, PATH)
    except PolarError as error:
        assert error.kind == "bad_request" and error.message
    else:
        assert isinstance(request, ChatRequest)


# --- what Gemini CLI sends ------------------------------------------------------------------------------


def test_gemini_cli_s_router() -> None:
    request = fixture("gemini_cli_router")
    assert [m.role for m in request.messages] == ["system", "user", "user"]
    assert request.response_schema is not None and request.response_schema["type"] == "object"
    properties = request.response_schema["properties"]
    assert [p["type"] for p in properties.values()] == ["string", "integer"]
    assert not request.tools and not request.stream and request.show_reasoning


def test_gemini_cli_s_turns_are_append_only() -> None:
    first, second = fixture("gemini_cli_turn1"), fixture("gemini_cli_turn2")
    assert second.messages[: len(first.messages)] == first.messages
    assert (first.tools, first.sampling, first.notes) == (second.tools, second.sampling, second.notes)
    answer, *results = second.messages[len(first.messages) :]
    assert (answer.text, answer.reasoning) == ("I will write it.", "The shell can do that.")
    assert [c.id for c in answer.tool_calls] == [r.tool_call_id for r in results]
    assert answer.tool_calls[0].arguments == json.dumps(
        {"command": "printf 'hé, %s:\\n' \"x\" > hello.txt"}, ensure_ascii=False
    )
    assert results[1].text == "Error:File not found: missing.txt"


@pytest.mark.parametrize(
    ("name", "edits"), [("gemini_cli_turn2", []), ("gemini_cli_resumed", ["reasoning_dropped"])]
)
def test_lineage_knows_what_gemini_cli_sends_back(name: str, edits: list[str]) -> None:
    request = fixture(name)
    said = fixture("gemini_cli_turn2").messages[2]
    call = ModelCall(CALL, "r", 0, "gemini", "POST x", "ok", answer=said, delivered=True)
    call.prompt_token_ids, call.completion_token_ids = [1, 2], [3]
    lineage = Lineage()
    lineage.add(call, fixture("gemini_cli_turn1"))
    request.messages = request.messages[:5]
    found = lineage.find(request)
    assert found.parent is not None and found.parent.call_id == CALL
    assert found.edits == edits


def test_a_resumed_session_keeps_the_ids() -> None:
    answer = fixture("gemini_cli_resumed").messages[2]
    assert [call_id_of(i) for i in answer.minted_ids] == [CALL, CALL]


def test_gemini_cli_s_web_search() -> None:
    request = fixture("gemini_cli_web_search")
    assert request.tools == [] and request.notes == ["withheld:google_search"]
