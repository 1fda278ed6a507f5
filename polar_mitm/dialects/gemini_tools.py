"""Tools of a Gemini request to canonical tools.

The provider's own tools (`googleSearch`, `codeExecution`, `urlContext`, ...) run on its machines: they are
not shown to the model, and the call's notes say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
from msgspec import Raw

from polar_mitm.dialects import gemini_wire as wire
from polar_mitm.dialects.gemini_names import camelised
from polar_mitm.dialects.gemini_schema import json_schema
from polar_mitm.dialects.reading import misread
from polar_mitm.errors import PolarError
from polar_mitm.types import Tool, ToolChoice

_declarations = msgspec.json.Decoder(
    list[wire.FunctionDeclaration] | wire.FunctionDeclaration, strict=False
).decode
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Toolbox:
    """The functions offered so far: a later one of the same name replaces the earlier."""

    def __init__(self, notes: dict[str, None]) -> None:
        self._tools: dict[str, Tool] = {}
        self._notes = notes

    def add(self, tools: Iterable[dict[str, Raw]]) -> None:
        """Add tools as they stand in the request.

        Raises:
            PolarError: kind `bad_request`, for a declaration that is none.
        """
        for index, tool in enumerate(tools):
            for key, value in tool.items():
                name = _HUMP.sub("_", key).lower()[:64]
                if bytes(value) in (b"null", b"[]"):
                    continue
                if name == "function_declarations":
                    self._declare(value, f"tools[{index}].functionDeclarations")
                else:
                    self._notes[f"withheld:{name}"] = None

    def _declare(self, value: Raw, at: str) -> None:
        try:
            found = _declarations(camelised(bytes(value), wire.FunctionDeclaration))
        except msgspec.MsgspecError as error:
            raise misread(error, at) from None
        for index, function in enumerate(found if isinstance(found, list) else [found]):
            if not function.name:
                raise PolarError("bad_request", f"{at}[{index}].name: field required")
            try:
                schema = json_schema(function.parameters_json_schema or function.parameters or {})
            except RecursionError as error:
                raise misread(error, f"{at}[{index}].parameters") from None
            parameters = schema or {"type": "object", "properties": {}}
            self._tools[function.name] = Tool(function.name, function.description or "", parameters)

    def choose(self, config: wire.ToolConfig | None) -> tuple[ToolChoice, list[Tool]]:
        """What `toolConfig` means: the choice, and the tools that it leaves.

        Raises:
            PolarError: kind `bad_request`, for an unknown mode or a function that is not declared.
        """
        tools = list(self._tools.values())
        calling = (config and config.function_calling_config) or wire.FunctionCallingConfig()
        mode = (calling.mode or "AUTO").upper()
        if mode == "NONE":
            return ToolChoice("none"), tools
        if mode in ("AUTO", "MODE_UNSPECIFIED"):
            return ToolChoice(), tools
        if mode not in ("ANY", "VALIDATED"):
            raise PolarError("bad_request", f"toolConfig.functionCallingConfig.mode: unknown mode {mode!r}")
        allowed = calling.allowed_function_names or []
        for name in allowed:
            if name not in self._tools:
                at = "toolConfig.functionCallingConfig.allowedFunctionNames"
                raise PolarError("bad_request", f"{at}: no function is called {name!r}")
        forced = mode == "ANY"
        if forced and len(allowed) == 1:
            return ToolChoice("tool", allowed[0]), tools
        if allowed and len(allowed) < len(tools):
            self._notes["filtered:allowed_tools"] = None
            tools = [tool for tool in tools if tool.name in allowed]
        if forced and not tools:
            self._notes["dropped:tool_choice"] = None  # it forces tools that are withheld
        return ToolChoice("required" if forced and tools else "auto"), tools
