"""Tools of a Responses request to canonical tools: functions, custom tools, namespaces of both.

Hosted tools (`web_search`, `tool_search`, ...) run on the provider's machines, and deferred ones wait for a
hosted search: neither is shown to the model, and the call's notes say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polar_mitm.dialects import responses_models as wire
from polar_mitm.dialects.custom_tool import INPUT_SCHEMA
from polar_mitm.errors import PolarError
from polar_mitm.types import Tool, ToolChoice, engine_tool_name


class Toolbox:
    """The tools offered so far, one per engine name: a later one of the same name replaces the earlier."""

    def __init__(self, notes: dict[str, None]) -> None:
        self._tools: dict[str, Tool] = {}
        self._notes = notes

    def add(self, tools: Iterable[wire.Tool], where: str, namespace: str | None = None) -> None:
        """Add tools as they stand in the request; `where` names the field for errors.

        Raises:
            PolarError: kind `bad_request`, for a tool without a name or a grammar without a definition.
        """
        for index, tool in enumerate(tools):
            if tool.type not in ("function", "custom", "namespace"):
                self._notes[f"withheld:{tool.type[:64]}"] = None
                continue
            at = f"{where}[{index}]"
            if not tool.name:
                raise PolarError("bad_request", f"{at}.name: a {tool.type} tool needs a name")
            if tool.defer_loading:
                self._notes["withheld:deferred_tool"] = None
            elif tool.type == "namespace":
                if tool.description:
                    self._notes["dropped:namespace_description"] = None
                self.add(tool.tools or [], f"{at}.tools", engine_tool_name(tool.name, namespace))
            else:
                offered = _tool(tool, tool.name, namespace, at)
                self._tools[offered.engine_name] = offered

    def choose(
        self, choice: str | dict[str, Any] | None, at: str = "tool_choice.name"
    ) -> tuple[ToolChoice, list[Tool]]:
        """What `tool_choice` means: the choice, and the tools that it leaves. `at` is where a name stands.

        Raises:
            PolarError: kind `bad_request`, for an unknown mode or a tool that is not offered.
        """
        tools = list(self._tools.values())
        match choice:
            case None | "auto":
                return ToolChoice(), tools
            case "none":
                return ToolChoice("none"), tools
            case "required":
                return ToolChoice("required" if tools else "auto"), tools
            case {"type": "function" | "custom" as kind, "name": str(name)}:
                found = next((t for t in tools if t.kind == kind and _named(t, choice)), None)
                if found is None:
                    raise PolarError("bad_request", f"{at}: no {kind} tool {name!r} is offered")
                return ToolChoice("tool", found.engine_name), tools
            case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": list(allowed)}:
                self._notes["filtered:allowed_tools"] = None
                tools = [t for t in tools if any(_named(t, entry) for entry in allowed)]
                return ToolChoice("required" if mode == "required" and tools else "auto"), tools
            case {"type": str(kind)} if kind not in ("function", "custom", "allowed_tools"):
                self._notes[f"withheld:{kind[:64]}"] = None
                return ToolChoice(), tools
        raise PolarError("bad_request", "tool_choice: neither a mode nor a tool")


def _named(tool: Tool, entry: Any) -> bool:
    """Whether `{"type", "name", "namespace"?}` of a tool choice means this tool."""
    if not isinstance(entry, dict):
        return False
    name = entry.get("name")
    if entry.get("type") == "namespace":
        return tool.namespace == name
    return name in (tool.name, tool.engine_name) and entry.get("namespace", tool.namespace) == tool.namespace


def _tool(tool: wire.Tool, name: str, namespace: str | None, at: str) -> Tool:
    description = tool.description or ""
    if tool.type == "function":
        parameters = tool.parameters or {"type": "object", "properties": {}}
        return Tool(name, description, parameters, "function", namespace)
    grammar, form = None, tool.format or {}
    if form.get("type") == "grammar":
        grammar = form.get("definition")
        if not isinstance(grammar, str):
            raise PolarError("bad_request", f"{at}.format.definition: a grammar needs its definition")
        description += f"\n\nThe input must match this {form.get('syntax', 'lark')} grammar:\n{grammar}"
    return Tool(name, description.strip(), INPUT_SCHEMA, "custom", namespace, grammar)
