"""A Gemini request to a canonical one; `gemini_history` reads its contents, `gemini_tools` its tools.

The model's name and whether to stream stand in the path. Notes that it leaves on a request:
`withheld:NAME` (a tool of the provider's), `filtered:allowed_tools`, `dropped:tool_choice`,
`placeholder:KIND` (a part that a local model cannot read), `framed:json_array` (see `JSON_ARRAY`),
`wrapped:enum` (see `ENUM`).
"""

from __future__ import annotations

import math
import re
from typing import Any
from urllib.parse import parse_qs, unquote

import msgspec

from polar_mitm.dialects import gemini_wire as wire
from polar_mitm.dialects.custom_tool import INPUT_SCHEMA
from polar_mitm.dialects.gemini_history import History, many
from polar_mitm.dialects.gemini_names import camelised
from polar_mitm.dialects.gemini_schema import json_schema
from polar_mitm.dialects.gemini_tools import Toolbox
from polar_mitm.dialects.reading import misread
from polar_mitm.errors import UNREADABLE, PolarError
from polar_mitm.types import ChatRequest, Sampling, ToolChoice

JSON_ARRAY = "framed:json_array"
"""The note of a request whose stream is to be one JSON array, as it is without `alt=sse`."""

ENUM = "wrapped:enum"
"""The note of a request for one word of several, which is sampled inside JSON and taken out of it again."""

_decode = msgspec.json.Decoder(wire.Request, strict=False).decode  # the API takes "5" for 5
_METHOD = re.compile(r"/models/(?P<model>[^/]+):(?P<method>\w+)\Z")


def decode(body: bytes, path: str) -> ChatRequest:
    """The canonical request of a body that was posted to `path`.

    Raises:
        PolarError: kind `bad_request`; the message names the field that is wrong.
    """
    where, _, query = path.partition("?")
    method = _METHOD.search(where)
    if method is None:
        raise PolarError("bad_request", f"no model and method in {where!r}")
    asked = _read(body)
    if asked.cached_content:
        raise PolarError("bad_request", "cachedContent: nothing is cached here; send the contents instead")
    notes: dict[str, None] = {}
    stream = method["method"] == "streamGenerateContent"
    asked_for = parse_qs(query)
    if stream and "sse" not in asked_for.get("alt", asked_for.get("$alt", ())):
        notes[JSON_ARRAY] = None
    history = History(notes)
    history.system(asked.system_instruction)
    for index, content in enumerate(many(asked.contents)):
        history.add(content, f"contents[{index}]")
    if not asked.contents:
        raise PolarError("bad_request", "contents: there is nothing to answer")
    config = asked.generation_config or wire.GenerationConfig()
    tools = Toolbox(notes)
    tools.add(many(asked.tools))
    choice, offered = tools.choose(asked.tool_config)
    return ChatRequest(
        model=unquote(method["model"]),
        messages=history.messages,
        tools=offered,
        tool_choice=choice if offered else ToolChoice(),
        sampling=_sampling(config),
        stream=stream,
        show_reasoning=bool(config.thinking_config and config.thinking_config.include_thoughts),
        response_schema=_schema(config, notes),
        n=config.candidate_count or 1,
        top_logprobs=(config.logprobs or 0) if config.response_logprobs else None,
        notes=list(notes),
    )


def _read(body: bytes) -> wire.Request:
    try:
        body.decode()  # some of it is read later only, which must not fail then
        return _decode(camelised(body, wire.Request))
    except UNREADABLE as error:
        raise misread(error) from None


def _sampling(config: wire.GenerationConfig) -> Sampling:
    for name, value in (("temperature", config.temperature), ("topP", config.top_p)):
        if value is not None and not math.isfinite(value):
            raise PolarError("bad_request", f"generationConfig.{name}: not a number")
    return Sampling(
        config.temperature,
        config.top_p,
        config.top_k,
        config.max_output_tokens,
        config.stop_sequences or None,
    )


def _schema(config: wire.GenerationConfig, notes: dict[str, None]) -> dict[str, Any] | None:
    mime_type = config.response_mime_type or ""
    if mime_type not in ("", "text/plain", "application/json", "text/x.enum"):
        raise PolarError("bad_request", f"generationConfig.responseMimeType: {mime_type} is not served here")
    asked = config.response_json_schema
    if asked is None:
        asked = config.response_schema
    if asked is not None and not isinstance(asked, dict):
        raise PolarError("bad_request", "generationConfig.responseJsonSchema: expected an object")
    try:
        schema = None if asked is None else json_schema(asked)
    except RecursionError as error:
        raise misread(error, "generationConfig.responseSchema") from None
    if mime_type == "text/x.enum":
        if schema is None or not schema.get("enum"):
            raise PolarError("bad_request", "generationConfig.responseSchema.enum: field required")
        notes[ENUM] = None
        return INPUT_SCHEMA | {"properties": {"input": schema}}
    if schema is None and mime_type == "application/json":
        return {"anyOf": [{"type": "object"}, {"type": "array"}]}
    return schema
