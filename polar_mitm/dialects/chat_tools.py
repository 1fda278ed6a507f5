"""Tools of a Chat Completions request to canonical tools.

The Responses API has the same tools with one level less, so they are brought into its form. What came before
`tools`, `functions` and `function_call`, is one function tool at a time.
"""

from __future__ import annotations

from typing import Any

import msgspec

from polar_mitm.dialects import chat_models as wire
from polar_mitm.dialects import responses_models
from polar_mitm.dialects.responses_tools import Toolbox
from polar_mitm.errors import PolarError
from polar_mitm.types import Tool, ToolChoice

FUNCTIONS = "mapped:functions"
"""The note of a request in the first form of tools: its answer calls by `function_call`."""


def offered(asked: wire.Request, notes: dict[str, None]) -> tuple[ToolChoice, list[Tool]]:
    """The tools that the model is to see, and its choice among them; `notes` get what it does not see.

    Raises:
        PolarError: kind `bad_request`; the message begins with the field that is wrong.
    """
    tools = Toolbox(notes)
    flat = [_flat_tool(tool, f"tools[{index}]") for index, tool in enumerate(asked.tools or [])]
    tools.add(flat, "tools")
    if asked.web_search_options is not None or asked.enable_search:
        notes["withheld:web_search"] = None
    if "audio" in (asked.modalities or ()):
        notes["withheld:audio"] = None
    if not asked.functions or asked.tools:
        choice = _flat_choice(asked.tool_choice)
        kind = choice["type"] if isinstance(choice, dict) and "type" in choice else None
        return tools.choose(choice, f"tool_choice.{kind}.name")
    notes[FUNCTIONS] = None
    tools.add([_flat_function(function) for function in asked.functions], "functions")
    match asked.function_call:
        case {"name": str(name)}:
            return tools.choose({"type": "function", "name": name}, "function_call.name")
        case None | "auto" | "none" as mode:
            return tools.choose(mode)
    raise PolarError("bad_request", "function_call: neither auto, none nor a function")


def _flat_tool(tool: wire.Tool, at: str) -> responses_models.Tool:
    if tool.type == "function":
        if tool.function is None:
            raise PolarError("bad_request", f"{at}.function: field required")
        flat = _flat_function(tool.function)
    elif tool.type == "custom":
        if tool.custom is None:
            raise PolarError("bad_request", f"{at}.custom: field required")
        form = None
        if tool.custom.format is not None and tool.custom.format.type == "grammar":
            if tool.custom.format.grammar is None:
                raise PolarError("bad_request", f"{at}.custom.format.grammar: field required")
            form = {"type": "grammar", **msgspec.to_builtins(tool.custom.format.grammar)}
        flat = responses_models.Tool("custom", tool.custom.name, tool.custom.description, format=form)
    else:
        flat = responses_models.Tool(tool.type)
    flat.defer_loading = tool.defer_loading
    return flat


def _flat_function(function: wire.Function) -> responses_models.Tool:
    return responses_models.Tool("function", function.name, function.description, function.parameters)


def _flat_choice(choice: Any) -> Any:
    match choice:
        case {"type": "function" | "custom" as kind, **rest}:
            named = rest.get(kind)
            return {"type": kind, "name": named.get("name") if isinstance(named, dict) else None}
        case {"type": "allowed_tools", "allowed_tools": {"tools": list(allowed), **rest}}:
            return {"type": "allowed_tools", "tools": [_flat_choice(entry) for entry in allowed], **rest}
    return choice
