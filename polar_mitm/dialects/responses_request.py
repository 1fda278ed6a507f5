"""A Responses request to a canonical one: items become messages, one assistant turn becomes one message.

What refers to earlier responses (`previous_response_id`, `item_reference`) was replaced before, by
`responses_state`; what is left of it, and of other state that the service keeps, is refused with a clear
message rather than answered wrongly. Volatile fields (`client_metadata`,
`internal_chat_message_metadata_passthrough`) are never read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from msgspec import Raw

from polar_mitm.dialects import responses_models as wire
from polar_mitm.dialects.ids import call_id_of, minted, unseal
from polar_mitm.dialects.reading import misread
from polar_mitm.dialects.responses_tools import Toolbox
from polar_mitm.errors import UNREADABLE, PolarError
from polar_mitm.types import (
    ChatRequest,
    ImagePart,
    Message,
    Part,
    Sampling,
    TextPart,
    ToolCall,
    ToolChoice,
)

COMPACTION = "mapped:compaction_trigger"
LOGPROBS = "message.output_text.logprobs"
"""The note of a request that wants its history compacted."""

_COMPACT = (
    "Summarise the conversation so far for a successor who will continue the work and sees only your "
    "summary: the task, decisions and their reasons, what is done, the state of files, what remains, and "
    "every detail needed to go on. Answer with the summary only, and call no tool."
)
_SUMMARY = "Summary of the conversation so far:\n\n"
_UNREADABLE_SUMMARY = "[an earlier part of the conversation was compacted; its summary cannot be read here]"

_ECHOED = (
    "metadata",
    "truncation",
    "top_logprobs",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "service_tier",
)

_T = TypeVar("_T")
_request = msgspec.json.Decoder(wire.Request).decode
_head = msgspec.json.Decoder(wire.Head).decode


def decode(body: bytes) -> ChatRequest:
    """The canonical request of a body.

    Raises:
        PolarError: kind `bad_request`; the message begins with the field that is wrong.
    """
    asked = _read(_request, body, "")
    for name in ("previous_response_id", "conversation", "prompt", "background"):
        if getattr(asked, name):
            raise PolarError("bad_request", f"{name}: no state is kept here; send the whole input instead")
    notes: dict[str, None] = {}
    tools = Toolbox(notes)
    tools.add(asked.tools or [], "tools")
    history = _History(tools, notes, asked.instructions)
    if isinstance(asked.input, str):
        history.message(wire.MessageItem("user", asked.input), "input")
    else:
        for index, item in enumerate(asked.input or []):
            history.add(item, f"input[{index}]")
    messages = history.messages()
    if not messages:
        raise PolarError("bad_request", "input: there is nothing to answer")
    choice, offered = tools.choose(asked.tool_choice)
    reasoning = asked.reasoning or wire.Reasoning()
    summary = reasoning.summary or reasoning.generate_summary
    return ChatRequest(
        model=asked.model,
        messages=messages,
        tools=offered,
        tool_choice=ToolChoice("none") if COMPACTION in notes else choice,
        parallel_tool_calls=asked.parallel_tool_calls,
        sampling=Sampling(asked.temperature, asked.top_p, max_tokens=asked.max_output_tokens),
        stream=bool(asked.stream),
        show_reasoning=bool(summary),
        top_logprobs=(asked.top_logprobs or 0) if LOGPROBS in (asked.include or ()) else None,
        response_schema=_schema(asked.text.format if asked.text else None),
        notes=list(notes),
        echo=_echo(asked) | {"reasoning": {"effort": reasoning.effort, "summary": summary}},
    )


def _echo(asked: wire.Request) -> dict[str, Any]:
    """What the response object repeats besides what the canonical request has."""
    said = {name: value for name in _ECHOED if (value := getattr(asked, name)) is not None}
    return said | {
        "store": asked.store is not False,
        "previous_response_id": asked.continued_response_id,
    }


def _read(decoder: Callable[[bytes | Raw], _T], data: bytes | Raw, where: str) -> _T:
    try:
        return decoder(data)
    except UNREADABLE as error:
        raise misread(error, where) from error


def _schema(form: wire.Format | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.type != "json_schema" or form.schema is None:
        raise PolarError(
            "bad_request", "text.format: neither text, json_object nor a json_schema with a schema"
        )
    return form.schema


class _History:
    """Folds items into messages, in order. `add` takes any item, the other methods one kind each."""

    def __init__(self, tools: Toolbox, notes: dict[str, None], instructions: str | None) -> None:
        self._tools = tools
        self._notes = notes
        self._system = [instructions] if instructions else []
        self._messages: list[Message] = []
        self._turn: Message | None = None  # the assistant's turn that further items of his join
        self._turn_call: str | None = None  # the call of ours that it is the answer of, where ids tell

    def messages(self) -> list[Message]:
        """The conversation; its system message, if any, comes first."""
        if not self._system:
            return self._messages
        return [Message("system", [TextPart("\n\n".join(self._system))]), *self._messages]

    def add(self, item: Raw, at: str) -> None:
        """One item of `input`; `at` names it for errors."""
        head = _read(_head, item, at)
        kind = head.type or ("message" if head.role else "item_reference")
        if known := _ITEMS.get(kind):
            decoder, method = known
            method(self, _read(decoder, item, at), at)
        elif kind == "compaction_trigger":
            self._notes[COMPACTION] = None
            self._say("user", [TextPart(_COMPACT)])
        elif kind == "item_reference":
            raise PolarError("bad_request", f"{at}: no items are kept here; send the item itself")
        else:  # a hosted tool's call or its output: say that it was there
            self._notes[f"placeholder:{kind[:64]}"] = None
            part = TextPart(f"[{kind[:64]}]")
            if kind.endswith("_output"):
                self._say("user", [part])
            else:
                self._assistant().content.append(part)

    def message(self, item: wire.MessageItem, at: str) -> None:
        if item.role == "user":
            self._say("user", self._parts(item.content))
        elif item.role == "assistant":
            turn = self._assistant(item.id)
            turn.content += self._parts(item.content)
            if (
                self._turn_call and len(turn.content) > 1
            ):  # what we split around tool calls was sampled as one text
                turn.content = [TextPart(turn.text)]
        elif item.role in ("system", "developer"):
            text = "\n\n".join(
                p.text if isinstance(p, TextPart) else "[image]" for p in self._parts(item.content)
            )
            if self._messages:  # chat templates take a system message in first place only
                self._notes["wrapped:system_message"] = None
                self._say("user", [TextPart(f"<system>{text}</system>")])
            else:
                self._system.append(text)
        else:
            raise PolarError("bad_request", f"{at}.role: unknown role {item.role!r}")

    def reasoning(self, item: wire.ReasoningItem, at: str) -> None:
        sealed = unseal(item.encrypted_content) if item.encrypted_content else None
        turn = self._assistant(item.id, minted("rs", sealed.call_id) if sealed else None)
        text = sealed.text if sealed else None
        if text is None:
            text = "\n\n".join(
                p.text for p in self._parts(item.summary or item.content) if isinstance(p, TextPart)
            )
            if not text and item.encrypted_content:
                self._notes["dropped:encrypted_reasoning"] = None
        if text:
            between = "\n\n" if turn.reasoning and not sealed else ""
            turn.reasoning = (turn.reasoning or "") + between + text

    def function_call(self, item: wire.FunctionCallItem, at: str) -> None:
        call = ToolCall(item.call_id, item.name, item.arguments, "function", item.namespace)
        self._assistant(item.id, item.call_id).tool_calls.append(call)

    def custom_call(self, item: wire.CustomCallItem, at: str) -> None:
        call = ToolCall(item.call_id, item.name, item.input, "custom", item.namespace)
        self._assistant(item.id, item.call_id).tool_calls.append(call)

    def output(self, item: wire.OutputItem, at: str) -> None:
        self._say("tool", self._parts(item.output), item.call_id)

    def tools(self, item: wire.ToolsItem, at: str) -> None:
        self._tools.add(item.tools, f"{at}.tools")

    def compaction(self, item: wire.CompactionItem, at: str) -> None:
        sealed = unseal(item.encrypted_content) if item.encrypted_content else None
        if sealed is None or sealed.text is None:
            self._notes["placeholder:compaction"] = None
            self._say("user", [TextPart(_UNREADABLE_SUMMARY)])
        else:
            self._say("user", [TextPart(_SUMMARY + sealed.text)])
            self._messages[-1].minted_ids.append(minted("msg", sealed.call_id))

    def agent_message(self, item: wire.AgentMessageItem, at: str) -> None:
        head = TextPart(f'<agent_message from="{item.author}" to="{item.recipient}">')
        self._say("user", [head, *self._parts(item.content), TextPart("</agent_message>")])

    def _say(self, role: Any, content: list[Part], call_id: str | None = None) -> None:
        """A message that is not the assistant's; it ends his turn."""
        self._turn = self._turn_call = None
        own = [call_id] if call_id and call_id_of(call_id) else []
        self._messages.append(Message(role, content, tool_call_id=call_id, minted_ids=own))

    def _assistant(self, *wire_ids: str | None) -> Message:
        """The assistant's turn that an item with these ids belongs to: answers of two calls are two turns."""
        own = [i for i in wire_ids if i and call_id_of(i)]
        call = call_id_of(own[0]) if own else None
        if self._turn is None or (call and self._turn_call and call != self._turn_call):
            self._turn, self._turn_call = Message("assistant"), None
            self._messages.append(self._turn)
        self._turn_call = self._turn_call or call
        self._turn.minted_ids += own
        return self._turn

    def _joined(self, content: wire.Content) -> str:
        parts = self._parts(content)
        return "\n\n".join(p.text if isinstance(p, TextPart) else "[image]" for p in parts)

    def _parts(self, content: wire.Content) -> list[Part]:
        if isinstance(content, str):
            return [TextPart(content)]
        return [self._part(p) for p in content or []]

    def _part(self, part: wire.Part) -> Part:
        if part.type == "input_image" and part.image_url:
            return ImagePart(part.image_url if isinstance(part.image_url, str) else part.image_url.url)
        if part.type == "encrypted_content" and part.encrypted_content:
            # Codex hands a model's "encrypted" argument to another agent; ours were never encrypted.
            sealed = unseal(part.encrypted_content)
            return TextPart(sealed.text or "" if sealed else part.encrypted_content)
        text = part.refusal if part.type == "refusal" else part.text
        if text is not None:
            return TextPart(text)
        self._notes[f"placeholder:{part.type[:64]}"] = None
        return TextPart(f"[{part.type[:64]}{f': {part.filename}' if part.filename else ''}]")


def _item(shape: type[_T], method: Callable[[_History, _T, str], None]) -> tuple[Any, Any]:
    return msgspec.json.Decoder(shape).decode, method


_ITEMS: dict[str, tuple[Any, Any]] = {
    "message": _item(wire.MessageItem, _History.message),
    "reasoning": _item(wire.ReasoningItem, _History.reasoning),
    "function_call": _item(wire.FunctionCallItem, _History.function_call),
    "custom_tool_call": _item(wire.CustomCallItem, _History.custom_call),
    "function_call_output": _item(wire.OutputItem, _History.output),
    "custom_tool_call_output": _item(wire.OutputItem, _History.output),
    "additional_tools": _item(wire.ToolsItem, _History.tools),
    "compaction": _item(wire.CompactionItem, _History.compaction),
    "compaction_summary": _item(wire.CompactionItem, _History.compaction),
    "context_compaction": _item(wire.CompactionItem, _History.compaction),
    "agent_message": _item(wire.AgentMessageItem, _History.agent_message),
}
