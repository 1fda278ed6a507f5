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
        self._buffer = bytearray()
        self._after_cr = False
        self._max = max_event_bytes

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
        scan_from = max(0, len(self._buffer) - 1)
        self._buffer += data
        events: list[Event] = []
        start = 0
        while (end := self._buffer.find(b"\n\n", max(start, scan_from))) >= 0:
            if end - start > self._max:
                raise EventTooLarge(self._max, events)
            if event := _parse(bytes(self._buffer[start : end + 1])):
                events.append(event)
            start = end + 2
        if start:
            del self._buffer[:start]
        if len(self._buffer) - self._buffer.endswith(b"\n") > self._max:
            raise EventTooLarge(self._max, events)
        return events


def _parse(block: bytes) -> Event | None:
    name = b""
    data: list[bytes] = []
    for line in block.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return Event(name.decode("utf-8", "replace"), b"\n".join(data)) if data else None


def encode(data: bytes, event: str = "") -> bytes:
    """One event on the wire. `data` holds no line break (JSON text has none)."""
    return b"event: %s\ndata: %s\n\n" % (event.encode(), data) if event else b"data: %s\n\n" % data
