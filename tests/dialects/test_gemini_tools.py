"""Tools and schemas of Gemini requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polar_mitm.dialects.gemini_schema import json_schema
from polar_mitm.types import (
    ToolChoice,
)
from tests.dialects.gemini_requests import (
    decode,
)

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
