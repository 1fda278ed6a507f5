"""A Chat Completions request to a canonical one: nearly message by message, since this is where both began.

Notes that it leaves on a request: `wrapped:system_message`, `dropped:prefill`, `dropped:message_name`,
`filtered:allowed_tools`, `mapped:functions`, `mapped:reasoning_details`, `placeholder:TYPE` (content that a
local model cannot read), `withheld:NAME` (a tool or a modality not shown to the model).

What a service does with reasoning in the history (`preserve_thinking`) is its chat template's business: it is
always passed on, as the other dialects do.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from polar_mitm.dialects import chat_models as wire
from polar_mitm.dialects import chat_tools
from polar_mitm.dialects.ids import call_id_of
from polar_mitm.dialects.reading import misread
from polar_mitm.errors import UNREADABLE, PolarError
from polar_mitm.types import (
    ChatRequest,
    ImagePart,
    Message,
    Part,
    Sampling,
    TextPart,
    ToolCall,
)

DETAILS = "mapped:reasoning_details"
"""The note of a request to OpenRouter, whose answers have reasoning a third time."""

_ROUTER = "/api/v1/"  # the beginning of its paths; other services have another

_decode = msgspec.json.Decoder(wire.Request).decode


def decode(body: bytes, path: str) -> ChatRequest:
    """The canonical request of a body that was sent to `path`.

    Raises:
        PolarError: kind `bad_request`; the message begins with the field that is wrong.
    """
    try:
        asked = _decode(body)
    except UNREADABLE as error:
        raise misread(error) from error
    notes: dict[str, None] = {}  # ordered, each once
    if path.startswith(_ROUTER):
        notes[DETAILS] = None
    history = _History(notes)
    for index, message in enumerate(asked.messages):
        history.add(message, f"messages[{index}]")
    messages = history.messages()
    if not messages:
        raise PolarError("bad_request", "messages: there is nothing to answer")
    choice, offered = chat_tools.offered(asked, notes)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise PolarError("bad_request", "top_logprobs: only with logprobs true")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    top_k = asked.top_k if asked.top_k is None else max(asked.top_k, 0)
    max_tokens = asked.max_completion_tokens or asked.max_tokens
    return ChatRequest(
        model=asked.model,
        messages=messages,
        tools=offered,
        tool_choice=choice,
        parallel_tool_calls=False if chat_tools.FUNCTIONS in notes else asked.parallel_tool_calls,
        sampling=Sampling(asked.temperature, asked.top_p, top_k, max_tokens, [s for s in stop if s] or None),
        stream=bool(asked.stream),
        stream_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        show_reasoning=_show_reasoning(asked),
        response_schema=_schema(asked.response_format),
        n=asked.n or 1,
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        notes=list(notes),
        agent=_agent(asked.metadata),
    )


_PROMPT_ID = re.compile(r"[^#]*#([^#]+)#\d+")


def _agent(metadata: Any) -> str:
    """Qwen Code's `promptId` is SESSION#AGENT#TURN, and SESSION########TURN of its main one."""
    said = metadata.get("promptId") if isinstance(metadata, dict) else None
    found = _PROMPT_ID.fullmatch(said) if isinstance(said, str) else None
    return found[1] if found else ""


def _show_reasoning(asked: wire.Request) -> bool:
    """Whether the answer may hold reasoning; whether there is any is for the engine's template to say."""
    kwargs = asked.chat_template_kwargs or wire.TemplateKwargs()
    router = asked.reasoning or wire.Reasoning()
    switches = (asked.enable_thinking, asked.include_reasoning, kwargs.enable_thinking, router.enabled)
    disabled = asked.thinking is not None and asked.thinking.type == "disabled"
    no_effort = "none" in (asked.reasoning_effort, router.effort)
    return not (False in switches or disabled or no_effort or router.exclude)


def _schema(form: wire.ResponseFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.type != "json_schema":
        raise PolarError("bad_request", "response_format.type: neither text, json_object nor json_schema")
    if form.json_schema is None or form.json_schema.schema is None:
        raise PolarError("bad_request", "response_format.json_schema.schema: field required")
    return form.json_schema.schema


# --- messages -------------------------------------------------------------------------------------------


class _History:
    """Folds messages into canonical ones, in order."""

    def __init__(self, notes: dict[str, None]) -> None:
        self._notes = notes
        self._system: list[str] = []
        self._messages: list[Message] = []
        self._num_function_calls = 0

    def messages(self) -> list[Message]:
        """The conversation; its system message, if any, comes first."""
        if self._messages and self._messages[-1].role == "assistant":
            self._notes["dropped:prefill"] = None  # it is rendered as a finished turn
        if not self._system:
            return self._messages
        return [Message("system", [TextPart("\n\n".join(self._system))]), *self._messages]

    def add(self, message: wire.Message, at: str) -> None:
        """One message; `at` names it for errors."""
        content = self._parts(message.content)
        if message.name and not isinstance(message, wire.FunctionResult | wire.ToolResult):
            self._notes["dropped:message_name"] = None
        match message:
            case wire.User():
                self._messages.append(Message("user", content))
            case wire.Assistant():
                self._messages.append(self._assistant(message, content, at))
            case wire.ToolResult(tool_call_id=wire_id):
                own = [wire_id] if call_id_of(wire_id) else []
                self._messages.append(Message("tool", content, tool_call_id=wire_id, minted_ids=own))
            case wire.FunctionResult():
                wire_id = f"function_call_{self._num_function_calls}"
                self._messages.append(Message("tool", content, tool_call_id=wire_id))
            case _:
                self._instruct(content)

    def _instruct(self, content: list[Part]) -> None:
        """Chat templates take a system message in first place only: later ones become marked user text."""
        text = "\n\n".join(p.text if isinstance(p, TextPart) else "[image]" for p in content)
        if not text:
            return
        if self._messages:
            self._notes["wrapped:system_message"] = None
            self._messages.append(Message("user", [TextPart(f"<system>{text}</system>")]))
        else:
            self._system.append(text)

    def _assistant(self, message: wire.Assistant, content: list[Part], at: str) -> Message:
        # The model samples one run of text; parts are only how a harness keeps it.
        text = "".join(p.text if isinstance(p, TextPart) else "[image]" for p in content)
        if message.refusal:
            text += message.refusal
        if message.audio is not None:
            self._notes["placeholder:audio"] = None
            text += "[audio]"
        reasoning = message.reasoning_content or message.reasoning or _joined(message.reasoning_details)
        out = Message("assistant", _text(text), reasoning or None)
        for index, call in enumerate(message.tool_calls or []):
            out.tool_calls.append(_call(call, f"{at}.tool_calls[{index}]"))
            if call_id_of(call.id):
                out.minted_ids.append(call.id)
        if called := message.function_call:
            self._num_function_calls += 1
            wire_id = f"function_call_{self._num_function_calls}"  # the API has none: by its place
            out.tool_calls.append(ToolCall(wire_id, called.name, called.arguments or ""))
        return out

    def _parts(self, content: wire.Content) -> list[Part]:
        if isinstance(content, str):
            return _text(content)
        return [part for each in content or () for part in self._part(each)]

    def _part(self, part: wire.Part) -> list[Part]:
        if part.type == "image_url" and part.image_url:
            return [ImagePart(part.image_url if isinstance(part.image_url, str) else part.image_url.url)]
        text = part.refusal if part.type == "refusal" else part.text
        if text is not None:
            return _text(text)
        kind = part.type[:64]
        self._notes[f"placeholder:{kind}"] = None
        named = f": {part.file.filename}" if part.file and part.file.filename else ""
        return [TextPart(f"[{kind}{named}]")]


def _text(text: str) -> list[Part]:
    """A string and a list of one text part are the same; an empty one is nothing, as null is."""
    return [TextPart(text)] if text else []


def _joined(details: list[wire.ReasoningDetail] | None) -> str:
    return "".join(detail.text or detail.summary or "" for detail in details or ())


def _call(call: wire.ToolCall, at: str) -> ToolCall:
    if call.type == "custom":
        if call.custom is None:
            raise PolarError("bad_request", f"{at}.custom: field required")
        return ToolCall(call.id, call.custom.name, call.custom.input, "custom")
    if call.function is None:
        raise PolarError("bad_request", f"{at}.function: field required")
    return ToolCall(call.id, call.function.name, call.function.arguments or "")
