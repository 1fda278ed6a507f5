"""What the Responses API remembers between requests: `previous_response_id`, `store`, `item_reference`.

A response that may be referred to is kept as the items that it was asked with and those that it answered, raw
as they were on the wire; a request that refers to one is made whole before it is decoded. Everything is read
from the wire of recorded calls, so a store has all that is needed to build the same state again.

Source: platform.openai.com/docs/guides/conversation-state and .../guides/websocket-mode. Unlike the service,
which forgets a response with `store: false` when its connection ends, we remember it for the whole rollout.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec
from msgspec import Raw, Struct

from polar_mitm.errors import UNREADABLE, PolarError
from polar_mitm.types import Wire

DIALECT = "openai_responses"
SOCKET_METHOD = "WS"
"""`Wire.method` of a message on a WebSocket."""

MAX_BYTES = 64 << 20
"""What a rollout's responses may hold, about, and the largest history that is put together."""
_ITEM_BYTES = 100  # what an item costs beside its bytes


class PreviousResponseNotFound(PolarError):
    """A `previous_response_id` that nothing is kept for. Codex then sends its whole history."""

    def __init__(self, response_id: str) -> None:
        super().__init__("bad_request", f"Previous response with id '{response_id}' not found.")


class _Asked(Struct):
    input: Raw = Raw(b"null")
    previous_response_id: str | None = None
    store: bool | None = None


class _Response(Struct):
    id: str | None = None
    status: str | None = None
    output: list[Raw] | None = None


class _Last(_Response):
    """The last line of an answer: a terminal event, or a whole response object."""

    response: _Response | None = None


class _Item(Struct):
    type: str | None = None
    id: str | None = None


class _Kept(Struct, eq=False):
    """One response. `items` are its own input and output; those before are `previous`'s."""

    previous: str | None
    items: list[bytes]
    output_ids: list[str]
    num_bytes: int


_asked = msgspec.json.Decoder(_Asked).decode
_last = msgspec.json.Decoder(_Last).decode
_item = msgspec.json.Decoder(_Item).decode
_items = msgspec.json.Decoder(list[Raw]).decode
_fields = msgspec.json.Decoder(dict[str, Raw]).decode


class Responses:
    """The responses of one rollout that a request may refer to, those used least recently forgotten first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._outputs: dict[str, bytes] = {}

    def whole(self, dialect: str, body: bytes) -> bytes:
        """A request with the items that it refers to in the place of the reference; others as they are, and
        so are all of other dialects.

        Raises:
            PreviousResponseNotFound: nothing is kept for its `previous_response_id`.
            PolarError: kind `too_large`, for a history over `max_bytes`.
        """
        if dialect != DIALECT or (b'"previous_response_id"' not in body and b'"item_reference"' not in body):
            return body
        try:
            fields, asked = _fields(body), _asked(body)
            own = list(_own(asked.input))
        except UNREADABLE:
            return body  # decoding says what is wrong with it
        items = [self._resolved(item) for item in own]
        if asked.previous_response_id is not None:
            fields["continued_response_id"] = fields["previous_response_id"]
            items = [*self._history(asked.previous_response_id), *items]
        elif items == own:  # it has the words, and refers to nothing
            return body
        fields.pop("previous_response_id", None)
        fields["input"] = Raw(b"[" + b",".join(items) + b"]")
        return msgspec.json.encode(fields)

    def keep(self, dialect: str, wire: Wire) -> None:
        """Keep a call's answer, unless it failed, or its request wants it forgotten."""
        if dialect != DIALECT:
            return
        try:
            asked, last = _asked(wire.request_body), _last(_last_line(wire.response_body))
            said = last.response or last
            if said.id is None or said.output is None or said.status not in ("completed", "incomplete"):
                return
            if asked.store is False and wire.method != SOCKET_METHOD:
                return
            own = [self._resolved(item) for item in _own(asked.input)]
            outputs = {_item(item).id or "": bytes(item) for item in said.output}
        except UNREADABLE:  # it was refused, or cut off
            return
        items = [*own, *(bytes(item) for item in said.output)]
        num_bytes = sum(map(len, items)) + _ITEM_BYTES * (1 + len(items))
        self._forget(said.id)
        self._kept[said.id] = _Kept(asked.previous_response_id, items, list(outputs), num_bytes)
        self._outputs |= outputs
        self._num_bytes += num_bytes
        self._evict(said.id)

    def _history(self, response_id: str) -> list[bytes]:
        """All items up to and with a response's output."""
        chain = list(self._chain(response_id))
        first = chain[-1][1].previous if chain else response_id
        if first is not None:
            raise PreviousResponseNotFound(response_id)
        if sum(kept.num_bytes for _, kept in chain) > self._max_bytes:
            raise PolarError("too_large", f"previous_response_id: more than {self._max_bytes} bytes")
        for name, _ in reversed(chain):
            self._kept.move_to_end(name)
        return [item for _, kept in reversed(chain) for item in kept.items]

    def _chain(self, response_id: str | None) -> Iterator[tuple[str, _Kept]]:
        """A response and those before it, as far as they are kept."""
        while response_id is not None and (kept := self._kept.get(response_id)) is not None:
            yield response_id, kept
            response_id = kept.previous

    def _resolved(self, item: bytes | Raw) -> bytes:
        raw = bytes(item)
        if b'"item_reference"' not in raw:
            return raw
        try:
            head = _item(raw)
        except UNREADABLE:
            return raw
        return self._outputs.get(head.id or "", raw) if head.type == "item_reference" else raw

    def _evict(self, newest: str) -> None:
        needed = {name for name, _ in self._chain(newest)}
        while self._num_bytes > self._max_bytes and (oldest := next(iter(self._kept))) not in needed:
            self._forget(oldest)

    def _forget(self, response_id: str) -> None:
        if (kept := self._kept.pop(response_id, None)) is not None:
            self._num_bytes -= kept.num_bytes
            for item_id in kept.output_ids:
                self._outputs.pop(item_id, None)


def _own(given: Raw) -> Iterator[bytes]:
    """The items of an `input`; a text is one message."""
    text = bytes(given)
    if text == b"null":
        return
    if text.startswith(b'"'):
        yield b'{"type":"message","role":"user","content":' + text + b"}"
    else:
        yield from map(bytes, _items(text))


def _last_line(answer: bytes) -> bytes:
    """Of an event stream, of messages line by line, or of a whole answer, which is one line."""
    return answer.rstrip().rpartition(b"\n")[2].removeprefix(b"data: ")
