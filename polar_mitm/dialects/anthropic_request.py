"""Anthropic Messages request to canonical.

Notes that it leaves on a request: `dropped:billing_header`, `dropped:redacted_thinking`,
`dropped:tool_choice`, `dropped:prefill`, `moved:system_message`, `placeholder:TYPE` (a block that a local
model cannot read), `withheld:NAME` (a tool not shown to the model).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from polar_mitm.dialects import anthropic_wire as wire
from polar_mitm.dialects import ids
from polar_mitm.dialects.tool_input import as_text
from polar_mitm.errors import PolarError
from polar_mitm.types import (
    ChatRequest,
    ImagePart,
    Message,
    Part,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)

_decode = msgspec.json.Decoder(wire.Request).decode

# Claude Code puts this line first, and changes it with each request: no prefix would ever be shared.
_BILLING = "x-anthropic-billing-header:"


def decode(body: bytes) -> ChatRequest:
    """See `base.Dialect.decode`."""
    try:
        return _Translation(_decode(body)).request
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PolarError("bad_request", f"invalid request body: {error}") from None
    except RecursionError:
        raise PolarError("bad_request", "invalid request body: nested too deeply") from None


class _Translation:
    """One request on its way; `request` is the result."""

    def __init__(self, asked: wire.Request) -> None:
        self._notes: dict[str, None] = {}  # ordered, each once
        self._offered: dict[str, bool] = {}  # what the conversation itself loaded and removed
        messages = self._system(asked.system)
        for index, turn in enumerate(asked.messages):
            if isinstance(turn, wire.User):
                messages += self._user(turn)
            elif isinstance(turn, wire.Assistant):
                messages.append(self._assistant(turn, f"messages[{index}]"))
            else:
                messages += self._system_turn(turn)
        if asked.messages and isinstance(asked.messages[-1], wire.Assistant):
            self._note("dropped:prefill")  # it is rendered as a finished turn
        tools = self._tools(asked.tools or [])
        choice = asked.tool_choice
        one_only = choice.disable_parallel_tool_use if choice else None
        thinking = asked.thinking
        schema = asked.output_format or (asked.output_config and asked.output_config.format)
        self.request = ChatRequest(
            model=asked.model,
            messages=messages,
            tools=tools,
            tool_choice=self._choice(choice, asked.tools or [], tools),
            parallel_tool_calls=None if one_only is None else not one_only,
            sampling=Sampling(
                asked.temperature, asked.top_p, asked.top_k, asked.max_tokens, asked.stop_sequences or None
            ),
            stream=bool(asked.stream),
            show_reasoning=thinking is not None
            and thinking.type != "disabled"
            and thinking.display != "omitted",
            response_schema=schema.schema if schema else None,
        )
        self.request.notes = list(self._notes)

    def _note(self, note: str) -> None:
        self._notes[note] = None

    # -- messages ------------------------------------------------------------------------------------

    def _system(self, system: str | list[wire.Text] | None) -> list[Message]:
        """The system blocks as one message, without the billing line."""
        texts = []
        for text in [system] if isinstance(system, str) else [block.text for block in system or ()]:
            if text.startswith(_BILLING):
                self._note("dropped:billing_header")
                text = text.partition("\n")[2]
            if text:
                texts.append(text)
        return [Message("system", [TextPart("\n\n".join(texts))])] if texts else []

    def _system_turn(self, turn: wire.System) -> list[Message]:
        """Chat templates take a system message only at the head: later ones become marked user text."""
        texts = []
        for block in [wire.Text(turn.content)] if isinstance(turn.content, str) else turn.content:
            if isinstance(block, wire.Text):
                texts.append(block.text)
            elif block.tool.name:
                self._offered[block.tool.name] = isinstance(block, wire.ToolAddition)
            else:  # an MCP server's whole set, or a tool defined in the message
                self._note(f"placeholder:{block.__struct_config__.tag}")
        text = "\n\n".join(filter(None, texts))
        if not text:
            return []
        self._note("moved:system_message")
        return [Message("user", [TextPart(f"<system>\n{text}\n</system>")])]

    def _user(self, turn: wire.User) -> list[Message]:
        """Tool results become messages of their own, ahead of what else the user says."""
        if isinstance(turn.content, str):
            return [Message("user", _text(turn.content))]
        results: list[Message] = []
        said: list[Part] = []
        for block in turn.content:
            if isinstance(block, wire.ToolResult):
                results.append(self._result(block))
            else:
                said += self._parts([block])
        return [*results, Message("user", said)] if said or not results else results

    def _result(self, block: wire.ToolResult) -> Message:
        content = block.content or []
        parts = _text(content) if isinstance(content, str) else self._parts(content)
        if block.is_error:
            parts = [TextPart("Error:"), *parts]
        ours = [block.tool_use_id] if ids.call_id_of(block.tool_use_id) else []
        return Message("tool", parts, tool_call_id=block.tool_use_id, minted_ids=ours)

    def _assistant(self, turn: wire.Assistant, where: str) -> Message:
        out = Message("assistant")
        if isinstance(turn.content, str):
            out.content = _text(turn.content)
            return out
        texts: list[str] = []
        reasoning: list[str] = []
        minted: dict[str, None] = {}  # ordered, each once
        for index, block in enumerate(turn.content):
            if isinstance(block, wire.Text):
                texts.append(block.text)
            elif isinstance(block, wire.ToolUse):
                arguments = as_text(block.input, f"{where}.content[{index}].input")
                out.tool_calls.append(ToolCall(block.id, block.name, arguments))
                if ids.call_id_of(block.id):
                    minted[block.id] = None
            elif isinstance(block, wire.Thinking):
                reasoning.append(_unseal(block.signature or "", minted) or block.thinking)
            elif isinstance(block, wire.RedactedThinking):
                reasoning.append(_unseal(block.data, minted))
                if not reasoning[-1]:
                    self._note("dropped:redacted_thinking")
            else:
                texts += (part.text for part in self._parts([block]) if isinstance(part, TextPart))
        # The model samples one run of text and one of reasoning; blocks are only how we had to cut them.
        out.content = _text("".join(texts))
        out.reasoning = "".join(reasoning) or None
        out.minted_ids = list(minted)
        return out

    # -- content blocks ------------------------------------------------------------------------------

    def _parts(self, blocks: Iterable[msgspec.Struct]) -> list[Part]:
        """Blocks that are text or images, or that can be told as text."""
        parts: list[Part] = []
        for block in blocks:
            match block:
                case wire.Text(text=text):
                    parts += _text(text)
                case wire.Image(source=wire.Base64Source(data, media_type)):
                    parts.append(ImagePart(f"data:{media_type};base64,{data}"))
                case wire.Image(source=wire.UrlSource(url)):
                    parts.append(ImagePart(url))
                case wire.Document(source=wire.TextSource(data)):
                    parts += _headed(block, _text(data))
                case wire.Document(source=wire.ContentSource(content)):
                    inside = _text(content) if isinstance(content, str) else self._parts(content)
                    parts += _headed(block, inside)
                case wire.SearchResult():
                    heading = f"{block.title} ({block.source})"
                    parts += [TextPart(heading), *self._parts(block.content)]
                case wire.ToolReference(tool_name):
                    self._offered[tool_name] = True
                    parts.append(TextPart(f"Tool loaded: {tool_name}"))
                case _:
                    kind = str(block.__struct_config__.tag)
                    self._note(f"placeholder:{kind}")
                    parts.append(TextPart(f"[{kind} left out]"))
        return parts

    # -- tools ---------------------------------------------------------------------------------------

    def _tools(self, tools: list[wire.Tool]) -> list[Tool]:
        """The function tools that the model is to see."""
        shown = []
        for index, tool in enumerate(tools):
            if tool.type in (None, "custom") and (not tool.name or tool.input_schema is None):
                missing = "input_schema" if tool.name else "name"
                raise PolarError("bad_request", f"tools[{index}].{missing}: field required")
            offered = self._offered.get(tool.name, not tool.defer_loading)
            if tool.input_schema is None or not offered:
                self._note(f"withheld:{tool.name or tool.type}")
            else:
                shown.append(Tool(tool.name, tool.description or "", tool.input_schema))
        return shown

    def _choice(
        self, choice: wire.ToolChoice | None, asked: list[wire.Tool], shown: list[Tool]
    ) -> ToolChoice:
        if choice is None or choice.type == "auto":
            return ToolChoice()
        if choice.type == "none":
            return ToolChoice("none")
        if choice.type == "tool" and all(tool.name != choice.name for tool in asked):
            raise PolarError("bad_request", f"tool_choice.name: no tool is called {choice.name!r}")
        if all(tool.name != choice.name for tool in shown) if choice.type == "tool" else not shown:
            self._note("dropped:tool_choice")  # it forces a tool that is withheld
            return ToolChoice()
        return ToolChoice("tool", choice.name) if choice.type == "tool" else ToolChoice("required")


def _text(text: str) -> list[Part]:
    """A string and a list of one text block are the same; an empty one is nothing."""
    return [TextPart(text)] if text else []


def _headed(document: wire.Document, parts: list[Part]) -> list[Part]:
    return [*(TextPart(line) for line in (document.title, document.context) if line), *parts]


def _unseal(blob: str, minted: dict[str, None]) -> str:
    """The reasoning inside a seal of ours, "" where it holds none; its call's id goes to `minted`."""
    seal = ids.unseal(blob)
    if seal is None:
        return ""
    if ids.call_id_of(call := ids.minted("rs", seal.call_id)):
        minted[call] = None
    return seal.text or ""
