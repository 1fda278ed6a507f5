"""Server-sent events, incrementally: any split of the bytes gives the same events.

Source: WHATWG HTML, section 9.2 "Server-sent events" (event stream interpretation).
"""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """One dispatched event. `event` is "" where the stream named none."""

    event: str
    data: bytes


class EventTooLarge(ValueError):
    """A single event grew past the decoder's limit. `events` came before it in the same chunk."""

    def __init__(self, limit: int, events: list[Event]) -> None:
        super().__init__(f"an event is longer than {limit} bytes")
        self.events = events


class SSEDecoder:
    """Bytes in, events out. `max_event_bytes` bounds what an endless event can make it hold.

    An event that the stream's end cuts short is dropped, as the specification says.
    """

    def __init__(self, max_event_bytes: int = 16 << 20) -> None:
        self._max = max_event_bytes
        self._after_cr = False
        self._at_start = True
        self._cut: list[bytes] = []  # a line whose end has not come
        self._num_bytes = 0  # of the event so far, line ends and `_cut` included
        self._name = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[Event]:
        """Decode a chunk.

        Raises:
            EventTooLarge: an event, finished or not, holds more than `max_event_bytes`.
        """
        if not data:
            return []
        # CRLF and CR both end a line; a CRLF may be split between chunks.
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if data:
            self._after_cr = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = data.split(b"\n")
        if lines and self._cut:
            self._num_bytes -= sum(map(len, self._cut))
            lines[0] = b"".join([*self._cut, lines[0]])
            self._cut = []
        events: list[Event] = []
        for line in lines:
            if self._at_start:
                self._at_start = False
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line:
                if self._data:
                    events.append(Event(self._name.decode("utf-8", "replace"), b"\n".join(self._data)))
                self._name, self._data, self._num_bytes = b"", [], 0
                continue
            self._num_bytes += len(line) + 1
            if self._num_bytes - 1 > self._max:
                raise EventTooLarge(self._max, events)
            self._read(line)
        if rest:
            self._cut.append(rest)
            self._num_bytes += len(rest)
            if self._num_bytes > self._max:
                raise EventTooLarge(self._max, events)
        return events

    def _read(self, line: bytes) -> None:
        if line.startswith(b"data: "):  # by far the most frequent
            self._data.append(line[6:])
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        elif field == b"event":
            self._name = value.removeprefix(b" ")


def encode(data: bytes, event: str = "") -> bytes:
    """One event on the wire. `data` holds no line break (JSON text has none)."""
    return b"event: %s\ndata: %s\n\n" % (event.encode(), data) if event else b"data: %s\n\n" % data
