"""A Gemini request to a canonical one: `contents` become messages, one turn of the model one message.

The model's name and whether to stream stand in the path. Notes that it leaves on a request:
`withheld:NAME` (a tool of the provider's), `filtered:allowed_tools`, `dropped:tool_choice`,
`placeholder:KIND` (a part that a local model cannot read), `framed:json_array` (see `JSON_ARRAY`),
`wrapped:enum` (see `ENUM`).
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote

import msgspec

from polar_mitm.dialects import gemini_wire as wire
from polar_mitm.dialects.custom_tool import INPUT_SCHEMA
from polar_mitm.dialects.gemini_names import camelised
from polar_mitm.dialects.gemini_schema import json_schema
from polar_mitm.dialects.gemini_tools import Toolbox
from polar_mitm.dialects.ids import Seal, call_id_of, minted, unseal
from polar_mitm.dialects.reading import misread
from polar_mitm.dialects.tool_input import as_text
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

JSON_ARRAY = "framed:json_array"
"""The note of a request whose stream is to be one JSON array, as it is without `alt=sse`."""

ENUM = "wrapped:enum"
"""The note of a request for one word of several, which is sampled inside JSON and taken out of it again."""

_T = TypeVar("_T")
_decode = msgspec.json.Decoder(wire.Request, strict=False).decode  # the API takes "5" for 5
_decode_response = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
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
    history = _History(notes)
    history.system(asked.system_instruction)
    for index, content in enumerate(_many(asked.contents)):
        history.add(content, f"contents[{index}]")
    if not asked.contents:
        raise PolarError("bad_request", "contents: there is nothing to answer")
    config = asked.generation_config or wire.GenerationConfig()
    tools = Toolbox(notes)
    tools.add(_many(asked.tools))
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


def _many(values: list[_T] | _T | None) -> list[_T]:
    if values is None:
        return []
    return values if isinstance(values, list) else [values]


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


class _History:
    """Folds contents into `messages`, in order."""

    def __init__(self, notes: dict[str, None]) -> None:
        self.messages: list[Message] = []
        self._notes = notes
        self._turn: Message | None = None  # the model's turn that further contents of its join
        self._turn_call: str | None = None  # the call of ours that it is the answer of
        self._thoughts: list[str] = []
        self._sealed: list[str] = []
        self._unanswered: list[ToolCall] = []
        self._num_calls = 0

    def system(self, content: wire.Content | None) -> None:
        parts = self._parts(_many(content.parts)) if content else []
        texts = [p.text if isinstance(p, TextPart) else "[image]" for p in parts]
        if text := "\n\n".join(filter(None, texts)):
            self.messages.append(Message("system", [TextPart(text)]))

    def add(self, content: wire.Content, at: str) -> None:
        """One element of `contents`; `at` names it for errors."""
        parts = _many(content.parts)
        if content.role == "model":
            self._model(parts, at)
        elif content.role in (None, "", "user", "function"):
            self._user(parts, at)
        else:
            raise PolarError("bad_request", f"{at}.role: {content.role!r} is neither user nor model")

    # -- the user ------------------------------------------------------------------------------------

    def _user(self, parts: list[wire.Part], at: str) -> None:
        """Answers of functions become messages of their own, ahead of what else the user says."""
        self._turn = self._turn_call = None
        rest: list[wire.Part] = []
        num_before = len(self.messages)
        for index, part in enumerate(parts):
            if part.function_response is None:
                rest.append(part)
            else:
                self._response(part.function_response, f"{at}.parts[{index}].functionResponse")
        if rest or len(self.messages) == num_before:
            self.messages.append(Message("user", self._parts(rest)))

    def _response(self, response: wire.FunctionResponse, at: str) -> None:
        call_id = _own(response.id, response.name) or self._called(response.name)
        self._unanswered = [call for call in self._unanswered if call.id != call_id]
        inside = [wire.Part(inline_data=p.inline_data, file_data=p.file_data) for p in response.parts or ()]
        parts = [*_output(response.response, f"{at}.response"), *self._parts(inside)]
        ours = [call_id] if call_id_of(call_id) else []
        self.messages.append(Message("tool", parts, tool_call_id=call_id, minted_ids=ours))

    def _called(self, name: str) -> str:
        """The id of the call that a response without one answers: the first of that name that waits."""
        return next((call.id for call in self._unanswered if call.name == name), name)

    # -- the model -----------------------------------------------------------------------------------

    def _model(self, parts: list[wire.Part], at: str) -> None:
        """One run of text, one of reasoning, as they were sampled; parts are only how we had to cut them.

        Clients that keep a stream's chunks as they came send an answer as several contents in a row.
        """
        seals = [_unsealed(part.thought_signature) for part in parts]
        own = [minted("rs", seal.call_id) for seal in seals if seal]
        own += [_own(p.function_call.id, p.function_call.name) for p in parts if p.function_call]
        turn = self._turn_of(next(filter(None, map(call_id_of, own)), None))
        said: list[wire.Part] = []
        for index, (part, seal) in enumerate(zip(parts, seals, strict=True)):
            if seal is not None:
                if call_id_of(sealed_id := minted("rs", seal.call_id)):
                    _once(turn.minted_ids, sealed_id)
                self._sealed.append(seal.text or "")
            if part.function_call is not None:
                turn.tool_calls.append(self._call(part.function_call, turn, f"{at}.parts[{index}]"))
            elif part.thought:
                self._thoughts.append(part.text or "")
            elif part.text != "" and not (part.text is None and part.thought_signature):
                said.append(part)
        turn.content = _joined([*turn.content, *self._parts(said)])
        # A seal holds the thoughts also where the harness leaves the parts that showed them out.
        turn.reasoning = "".join(self._sealed) or "".join(self._thoughts) or None

    def _turn_of(self, call: str | None) -> Message:
        """The model's turn that an answer of `call` belongs to: answers of two calls are two turns."""
        if self._turn is None or (call and self._turn_call and call != self._turn_call):
            self._turn, self._turn_call = Message("assistant"), None
            self._thoughts, self._sealed, self._unanswered = [], [], []
            self.messages.append(self._turn)
        self._turn_call = self._turn_call or call
        return self._turn

    def _call(self, call: wire.FunctionCall, turn: Message, at: str) -> ToolCall:
        """A call of a function. Some clients leave its id out: then its place in an answer of ours tells."""
        call_id = _own(call.id, call.name)
        if not call_id and self._turn_call:
            call_id = minted("call", self._turn_call, len(turn.tool_calls))
        call_id = call_id or f"call_{self._num_calls}"
        self._num_calls += 1
        if call_id_of(call_id):
            _once(turn.minted_ids, call_id)
        arguments = "{}" if bytes(call.args) == b"null" else as_text(call.args, f"{at}.functionCall.args")
        out = ToolCall(call_id, call.name, arguments)
        self._unanswered.append(out)
        return out

    # -- parts ---------------------------------------------------------------------------------------

    def _parts(self, parts: Iterable[wire.Part]) -> list[Part]:
        return [self._part(p) for p in parts if p.text != ""]

    def _part(self, part: wire.Part) -> Part:
        if part.text is not None:
            return TextPart(part.text)
        blob = part.inline_data
        if blob is not None and blob.mime_type.startswith("image/"):
            data = blob.data.translate(_TO_STANDARD)
            return ImagePart(f"data:{blob.mime_type};base64,{data}")
        kind, name = "part", ""
        if blob is not None:
            kind, name = "inline_data", f" of type {blob.mime_type}"
        elif part.file_data is not None:
            kind, name = "file_data", f": {part.file_data.file_uri}"
        elif part.executable_code is not None:
            kind = "executable_code"
        elif part.code_execution_result is not None:
            kind = "code_execution_result"
        self._notes[f"placeholder:{kind}"] = None
        return TextPart(f"[{kind}{name} left out]")


_TO_STANDARD = str.maketrans("-_", "+/")


def _own(wire_id: str | None, name: str) -> str:
    """A function call's id, without the `NAME__` that Gemini CLI puts before ours; "" for none."""
    bare = (wire_id or "").removeprefix(f"{name.strip() or 'generic_tool'}__")
    return bare if call_id_of(bare) else wire_id or ""


def _unsealed(signature: str | None) -> Seal | None:
    """The seal in a thought signature; None for anybody else's."""
    if not signature:
        return None
    text = signature.translate(_TO_STANDARD)
    try:
        blob = base64.b64decode(text + "=" * (-len(text) % 4), validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return None
    return unseal(blob)


def _once(ids: list[str], own: str) -> None:
    if own not in ids:
        ids.append(own)


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbouring texts as one."""
    out: list[Part] = []
    for part in parts:
        if out and isinstance(part, TextPart) and isinstance(before := out[-1], TextPart):
            out[-1] = TextPart(before.text + part.text)
        else:
            out.append(part)
    return out


def _output(response: msgspec.Raw, at: str) -> list[Part]:
    """What a function gave back: `output` or `error` where that is all, else the whole object."""
    if bytes(response) == b"null":
        return []
    try:
        fields = _decode_response(response)
    except msgspec.MsgspecError:
        raise PolarError("bad_request", f"{at}: expected an object") from None
    if len(fields) == 1:
        (key, value), *_ = fields.items()
        if key in ("output", "error"):
            text = _plain(value)
            head = [TextPart("Error:")] if key == "error" else []
            return [*head, TextPart(text)] if text else [*head]
    return [TextPart(bytes(response).decode())]


def _plain(value: msgspec.Raw) -> str:
    """A string's text, any other value's JSON."""
    text = bytes(value)
    return msgspec.json.decode(text, type=str) if text.startswith(b'"') else text.decode()
