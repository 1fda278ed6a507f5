"""Canonical answer to the Responses event stream, and to the response object that it ends with.

Source: platform.openai.com/docs/api-reference/responses-streaming and the official SDK's event types.

Items are numbered in the order in which the engine begins them. Reasoning and text end where something else
begins; tool calls stay open to the end, since engines may interleave their fragments and since a harness
runs a call as soon as it is done, which must not be before the call is recorded. A call whose arguments were
cut off gets no `done` events, so nobody runs half a command; the response lists it as `incomplete`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import msgspec

from polar_mitm import sse
from polar_mitm.dialects.custom_tool import InputUnwrapper
from polar_mitm.dialects.ids import minted, seal
from polar_mitm.dialects.openai_logprobs import logprob_objects
from polar_mitm.dialects.responses_answer import BROKEN_OFF, response_object, stream_error, usage_object
from polar_mitm.dialects.responses_request import COMPACTION
from polar_mitm.errors import PolarError
from polar_mitm.types import (
    ChatRequest,
    Completion,
    Delta,
    Message,
    TokenLogprob,
    ToolCallDelta,
    engine_tool_name,
)

_encode = msgspec.json.Encoder().encode
_Wire = dict[str, Any]

# --- items ----------------------------------------------------------------------------------------------


class _Item(ABC):
    """An output item being made. `before` and `after` frame the JSON string of its delta event."""

    def __init__(self, kind: str, prefix: str, call_id: str, index: int, part: str = "") -> None:
        self.kind = kind
        self.id = minted(prefix, call_id, index)
        self.index = index
        self.text: list[str] = []
        self.at: _Wire = {"item_id": self.id, "output_index": index}
        event = f"response.{kind}.delta"
        where = f'"item_id":"{self.id}","output_index":{index}{part}'
        self.before = f'event: {event}\ndata: {{"type":"{event}",{where},"delta":'.encode()
        self.after = b',"sequence_number":'

    @abstractmethod
    def wire(self, status: str) -> _Wire:
        """The item as it stands."""


class _Text(_Item):
    def __init__(self, call_id: str, index: int) -> None:
        super().__init__("output_text", "msg", call_id, index, ',"content_index":0')
        self.after = b',"logprobs":[],"sequence_number":'
        self.logprobs: list[_Wire] = []

    def part(self) -> _Wire:
        text = "".join(self.text)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self.logprobs)}

    def wire(self, status: str) -> _Wire:
        content = [] if status == "in_progress" else [self.part()]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


class _Reasoning(_Item):
    def __init__(self, call_id: str, index: int, shown: bool) -> None:
        super().__init__("reasoning_summary_text", "rs", call_id, index, ',"summary_index":0')
        self.shown = shown
        self._call_id = call_id

    def part(self) -> _Wire:
        return {"type": "summary_text", "text": "".join(self.text)}

    def wire(self, status: str) -> _Wire:
        begun = status == "in_progress"
        return {
            "id": self.id,
            "type": "reasoning",
            "summary": [self.part()] if self.shown and not begun else [],
            "encrypted_content": seal(self._call_id, None if begun else "".join(self.text)),
        }


class _Call(_Item):
    def __init__(self, request: ChatRequest, call_id: str, index: int, call: ToolCallDelta) -> None:
        name = call.name or ""
        tool = request.find_tool(name)
        self.custom = tool is not None and tool.kind == "custom"
        self.unwrapper = InputUnwrapper() if self.custom else None
        if self.custom:
            super().__init__("custom_tool_call_input", "ctc", call_id, index)
        else:
            super().__init__("function_call_arguments", "fc", call_id, index)
        self.field = "input" if self.custom else "arguments"
        self.name = tool.name if tool else name
        self._head: _Wire = {
            "id": self.id,
            "type": "custom_tool_call" if self.custom else "function_call",
            "call_id": minted("call", call_id, call.index),
            "name": self.name,
        }
        if tool is not None and tool.namespace is not None:
            self._head["namespace"] = tool.namespace

    @property
    def complete(self) -> bool:
        """Whether the arguments reached their end, by their own form."""
        if self.unwrapper is not None:
            return self.unwrapper.complete
        try:
            msgspec.json.decode("".join(self.text), type=msgspec.Raw)
        except (msgspec.MsgspecError, RecursionError):
            return False
        return True

    def wire(self, status: str) -> _Wire:
        return self._head | {"status": status, self.field: "".join(self.text)}


# --- the stream -----------------------------------------------------------------------------------------


class ResponsesStream:
    """The `StreamEncoder` of Responses. `response` is the last response object sent.

    White space is held back until text follows, and dropped where only tool calls do: models separate calls
    with it, and a harness would take it for a message.
    """

    def __init__(self, request: ChatRequest, call_id: str, created_at: float) -> None:
        self._request = request
        self._call_id = call_id
        self._sequence = 0
        self._open: _Text | _Reasoning | None = None
        self._calls: dict[int, _Call] = {}
        self._num_items = 0
        self._done: dict[int, _Wire] = {}
        self._blank = ""
        self._shown: list[TokenLogprob] = []  # of text that is not sent yet
        self.response = response_object(request, call_id, created_at)

    def start(self) -> bytes:
        started = {"response": self.response}
        return self._event("response.created", started) + self._event("response.in_progress", started)

    def delta(self, delta: Delta) -> bytes:
        text = delta.text
        if delta.shown_logprobs:
            self._shown += delta.shown_logprobs
        elif text and type(self._open) is _Text and not delta.reasoning and not delta.tool_calls:
            return self._delta(self._open, text)  # by far the most frequent
        out = self._reasoning(delta.reasoning) if delta.reasoning else b""
        if text:
            out += self._text(text)
        for call in delta.tool_calls:
            out += self._call(call)
        return out

    def keepalive(self) -> bytes:
        """Nothing: the API has no such event, and opencode gives up on one that it does not know."""
        return b""

    def finish(self, completion: Completion) -> bytes:
        if completion.finish_reason in ("abort", None):
            return self.error(PolarError("upstream", BROKEN_OFF))
        return self._finish(completion)

    def error(self, error: PolarError) -> bytes:
        self.response |= {"status": "failed", "error": stream_error(error), "output": self._output()}
        return self._event("response.failed", {"response": self.response})

    def end_empty(self) -> bytes:
        """The end of a response that was to hold nothing."""
        return self._end(Completion(Message("assistant")), [], cut=False)

    def _finish(self, completion: Completion) -> bytes:
        out = b""
        if not self._calls and (self._blank or not self._num_items):
            out += self._text("", settled=True)
        cut = completion.finish_reason in ("length", "content_filter")
        out += self._close("incomplete" if cut else "completed")
        for call in self._calls.values():
            out += self._end_call(call, cut)
        return out + self._end(completion, self._output(), cut)

    def _output(self) -> list[_Wire]:
        return [item for _, item in sorted(self._done.items())]

    def _end(self, completion: Completion, output: list[_Wire], cut: bool) -> bytes:
        status = "incomplete" if cut else "completed"
        self.response |= {"status": status, "output": output, "usage": usage_object(completion)}
        if cut:
            reason = "max_output_tokens" if completion.finish_reason == "length" else "content_filter"
            self.response["incomplete_details"] = {"reason": reason}
        return self._event(f"response.{status}", {"response": self.response})

    def _event(self, kind: str, fields: _Wire) -> bytes:
        data = _encode({"type": kind, **fields, "sequence_number": self._sequence})
        self._sequence += 1
        return sse.encode(data, kind)

    def _delta(self, item: _Item, text: str) -> bytes:
        item.text.append(text)
        self._sequence += 1
        return b"%b%b%b%d}\n\n" % (item.before, _encode(text), item.after, self._sequence - 1)

    def _begin(self, item: _Item) -> bytes:
        self._num_items += 1
        fields = {"output_index": item.index, "item": item.wire("in_progress")}
        return self._close() + self._event("response.output_item.added", fields)

    def _text(self, text: str, settled: bool = False) -> bytes:
        out = b""
        if type(self._open) is not _Text:
            text = self._blank + text
            if not settled and (not text or text.isspace()):
                self._blank = text
                return b""
            self._blank = ""
            item = _Text(self._call_id, self._num_items)
            out = self._begin(item)
            self._open = item
            fields = {**item.at, "content_index": 0, "part": item.part()}
            out += self._event("response.content_part.added", fields)
        return out + (self._text_delta(self._open, text) if text else b"")

    def _text_delta(self, item: _Text, text: str) -> bytes:
        if not self._shown:
            return self._delta(item, text)
        item.text.append(text)
        logprobs, self._shown = logprob_objects(self._shown), []
        item.logprobs += logprobs
        fields = {**item.at, "content_index": 0, "delta": text, "logprobs": logprobs}
        return self._event("response.output_text.delta", fields)

    def _reasoning(self, text: str) -> bytes:
        out = b""
        if type(self._open) is not _Reasoning:
            item = _Reasoning(self._call_id, self._num_items, self._request.show_reasoning)
            out = self._begin(item)
            self._open = item
            if item.shown:
                fields = {**item.at, "summary_index": 0, "part": item.part()}
                out += self._event("response.reasoning_summary_part.added", fields)
        if self._open.shown:
            return out + self._delta(self._open, text)
        self._open.text.append(text)
        return out

    def _call(self, call: ToolCallDelta) -> bytes:
        out = b""
        item = self._calls.get(call.index)
        if item is None:
            item = self._calls[call.index] = _Call(self._request, self._call_id, self._num_items, call)
            out = self._begin(item)
        text = item.unwrapper.feed(call.arguments) if item.unwrapper else call.arguments
        return out + (self._delta(item, text) if text else b"")

    def _close(self, status: Literal["completed", "incomplete"] = "completed") -> bytes:
        """End the open reasoning or text."""
        item, self._open = self._open, None
        if item is None:
            return b""
        out = b""
        part = item.part()
        if isinstance(item, _Text):
            fields = {**item.at, "content_index": 0}
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            out += self._event("response.output_text.done", fields | said)
            out += self._event("response.content_part.done", {**fields, "part": part})
        elif item.shown:
            fields = {**item.at, "summary_index": 0}
            out += self._event("response.reasoning_summary_text.done", {**fields, "text": part["text"]})
            out += self._event("response.reasoning_summary_part.done", {**fields, "part": part})
        return out + self._item_done(item, status)

    def _end_call(self, item: _Call, cut: bool) -> bytes:
        out = b""
        if item.unwrapper and (rest := item.unwrapper.finish()):
            out += self._delta(item, rest)
        if cut and not item.complete:
            self._done[item.index] = item.wire("incomplete")
            return out
        fields = {**item.at, item.field: "".join(item.text)}
        if not item.custom:
            fields["name"] = item.name
        return out + self._event(f"response.{item.kind}.done", fields) + self._item_done(item, "completed")

    def _item_done(self, item: _Item, status: str) -> bytes:
        wire = self._done[item.index] = item.wire(status)
        return self._event("response.output_item.done", {"output_index": item.index, "item": wire})


class CompactionStream(ResponsesStream):
    """The answer to a compaction trigger: whatever was sampled becomes one sealed `compaction` item.

    Codex takes anything but a completed response with exactly one such item for a fatal error, so a summary
    that the token limit cut short counts as complete here (the record keeps the true finish reason).
    """

    def __init__(self, request: ChatRequest, call_id: str, created_at: float) -> None:
        super().__init__(request, call_id, created_at)
        self._summary: list[str] = []
        self._thoughts: list[str] = []
        self._commands: list[str] = []

    def delta(self, delta: Delta) -> bytes:
        self._summary.append(delta.text)
        self._thoughts.append(delta.reasoning)
        for call in delta.tool_calls:
            self._commands.append(f"\n{call.name} " if call.name else "")
            self._commands.append(call.arguments)
        return b""

    def _finish(self, completion: Completion) -> bytes:
        said = ("".join(each).strip() for each in (self._summary, self._thoughts, self._commands))
        summary = next(filter(None, said), "")
        item = {
            "id": minted("cmp", self._call_id),
            "type": "compaction",
            "encrypted_content": seal(self._call_id, summary),
        }
        fields = {"output_index": 0, "item": item}
        events = [self._event(f"response.output_item.{what}", fields) for what in ("added", "done")]
        return b"".join(events) + self._end(completion, [item], cut=False)


def stream(request: ChatRequest, call_id: str, created_at: float) -> ResponsesStream:
    """The encoder for a request."""
    make = CompactionStream if COMPACTION in request.notes else ResponsesStream
    return make(request, call_id, created_at)


def whole(request: ChatRequest, completion: Completion, call_id: str, created_at: float) -> _Wire:
    """The response object of a whole answer: what a stream of the same answer ends with."""
    answer = completion.message
    encoder = stream(request, call_id, created_at)
    calls = [
        ToolCallDelta(index, engine_tool_name(call.name, call.namespace), call.arguments)
        for index, call in enumerate(answer.tool_calls)
    ]
    encoder.delta(Delta(answer.text, answer.reasoning or "", calls, shown_logprobs=completion.shown_logprobs))
    encoder.finish(completion)
    return encoder.response
