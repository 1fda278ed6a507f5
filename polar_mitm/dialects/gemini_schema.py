"""Gemini's schemas to JSON schemas.

Source: ai.google.dev/api/caching#Schema (a subset of OpenAPI 3.0: upper-case types, `nullable`, 64-bit
counts as strings, `propertyOrdering`). Harnesses also send JSON schemas with upper-case types, so both are
read here: what is a JSON schema already stays as it is.
"""

from __future__ import annotations

from typing import Any

_CAMEL = {
    "any_of": "anyOf",
    "max_items": "maxItems",
    "min_items": "minItems",
    "max_length": "maxLength",
    "min_length": "minLength",
    "max_properties": "maxProperties",
    "min_properties": "minProperties",
    "property_ordering": "propertyOrdering",
    "additional_properties": "additionalProperties",
    "defs": "$defs",
    "ref": "$ref",
}
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_COUNTS = {"maxItems", "minItems", "maxLength", "minLength", "maxProperties", "minProperties"}
_TYPES = {"STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL"}
# Formats that say how wide a number is, or that there is an `enum`: no formats of a JSON schema.
_FORMATS = {"int32", "int64", "float", "double", "enum"}


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema that `schema` means. Properties come in their `propertyOrdering`."""
    out: dict[str, Any] = {}
    for name, value in schema.items():
        key = _CAMEL.get(name, name)
        if key in _MAPS and isinstance(value, dict):
            out[key] = {k: _inner(v) for k, v in value.items()}
        elif key in _LISTS and isinstance(value, list):
            out[key] = [_inner(v) for v in value]
        elif key in _COUNTS and isinstance(value, str) and value.isdecimal():
            out[key] = int(value)
        elif key == "type":
            out[key] = [_type(v) for v in value] if isinstance(value, list) else _type(value)
        elif key in ("items", "additionalProperties", "not"):
            out[key] = _inner(value)
        else:
            out[key] = value
    if out.get("type") == "TYPE_UNSPECIFIED":
        del out["type"]
    if isinstance(out.get("format"), str) and out["format"] in _FORMATS:
        del out["format"]
    _order(out)
    return _nullable(out) if out.pop("nullable", None) is True else out


def _inner(value: Any) -> Any:
    if isinstance(value, list):
        return [_inner(v) for v in value]
    return json_schema(value) if isinstance(value, dict) else value


def _type(value: Any) -> Any:
    return value.lower() if isinstance(value, str) and value in _TYPES else value


def _order(schema: dict[str, Any]) -> None:
    """Guided decoding writes properties in the order in which they stand."""
    order, properties = schema.pop("propertyOrdering", None), schema.get("properties")
    if isinstance(order, list) and isinstance(properties, dict):
        first = {k: properties[k] for k in order if isinstance(k, str) and k in properties}
        schema["properties"] = first | properties


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """`nullable` of OpenAPI 3.0: null is a value too."""
    if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
        schema["enum"] = [*schema["enum"], None]
    if isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    elif isinstance(schema.get("anyOf"), list):
        schema["anyOf"] = [*schema["anyOf"], {"type": "null"}]
    return schema
