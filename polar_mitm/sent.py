"""What a harness is given for one call, byte for byte and when, as its record has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from polar_mitm.dialects.base import Reply
from polar_mitm.types import ModelCall


class Sent:
    """Notes on `call.wire` the answer that goes out; the bytes stay here until they are wanted."""

    def __init__(self, call: ModelCall, clock: Callable[[], float]) -> None:
        self._call = call
        self._clock = clock
        self._chunks: list[bytes] = []

    @property
    def begun(self) -> bool:
        """The answer's head is out."""
        return self._call.wire.status != 0

    @property
    def body(self) -> bytes:
        """All bytes so far."""
        return b"".join(self._chunks)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers go out."""
        self._call.wire.status = status
        self._call.wire.response_headers = list(headers.items())

    def add(self, data: bytes) -> bytes:
        """These bytes go out next: they are returned."""
        if data:
            self._chunks.append(data)
            self._call.wire.chunk_sizes.append(len(data))
            self._call.wire.chunk_at_ms.append((self._clock() - self._call.started_at) * 1000)
        return data

    def instead(self, reply: Reply) -> Reply:
        """This whole answer goes out, in place of what was added and never released."""
        self._chunks.clear()
        self._call.wire.chunk_sizes.clear()
        self._call.wire.chunk_at_ms.clear()
        self.head(reply.status, reply.headers)
        self.add(reply.body)
        return reply
