"""The `contents` of a Gemini request to messages: one turn of the model becomes one message."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from polar_mitm.dialects import gemini_wire as wire
from polar_mitm.dialects.ids import Seal, call_id_of, minted, unseal
from polar_mitm.dialects.tool_input import as_text
from polar_mitm.errors import PolarError
from polar_mitm.types import ImagePart, Message, Part, TextPart, ToolCall

_T = TypeVar("_T")
_decode_response = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def many(values: list[_T] | _T | None) -> list[_T]:
    """Where the API takes an array, it also takes its one element."""
    if values is None:
        return []
    return values if isinstance(values, list) else [values]


class History:
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
        """The system instruction, which comes before all contents."""
        parts = self._parts(many(content.parts)) if content else []
        texts = [p.text if isinstance(p, TextPart) else "[image]" for p in parts]
        if text := "\n\n".join(filter(None, texts)):
            self.messages.append(Message("system", [TextPart(text)]))

    def add(self, content: wire.Content, at: str) -> None:
        """One element of `contents`; `at` names it for errors."""
        parts = many(content.parts)
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
