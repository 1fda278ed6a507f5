"""Gemini requests to canonical: the path, names, the configuration, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.errors import PolarError
from polar_mitm.types import (
    ChatRequest,
    Sampling,
    Tool,
)
from tests.dialects.gemini_requests import (
    PATH,
    called,
    decode,
    dialect,
    refusal,
    refused,
    responded,
    signature,
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
