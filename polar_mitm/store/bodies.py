"""Bodies without secrets, each stored as what it adds to the body that its session sent before.

A harness sends its whole history with every call, so a session's raw requests grow quadratically. Stored
against the one before, a body costs what is new, in bytes and in time: what both share is neither searched
for secrets nor compressed again.

A frame is `<BII` (kind, head, tail) and zstd (RFC 8878) of the middle: the body is base[:head] + middle +
base[-tail:]. A middle of kind 1 is compressed with the base as raw-content dictionary, for the case that a
change at the front moved everything.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import zstandard

from polar_mitm.store.redact import redact_body

_HEADER = struct.Struct("<BII")
_LEVEL = 3
_LONG_MIDDLE = 8192


class Base(NamedTuple):
    """A stored body, and the secrets that it was cleaned of."""

    body: bytes = b""
    known: tuple[bytes, ...] = ()


NO_BASE = Base()


class Packer:
    """Makes frames. Not for use by two threads at once."""

    def __init__(self) -> None:
        self._plain = zstandard.ZstdCompressor(level=_LEVEL)

    def pack(self, body: bytes, known: tuple[bytes, ...], base: Base) -> tuple[bytes, bytes]:
        """`body` without secrets, and its frame on top of `base`. Nothing packs to nothing."""
        if not body:
            return b"", b""
        if known != base.known:
            body = redact_body(body, known)
        head, tail = cut(body, base.body)
        middle = body[head : len(body) - tail]
        if known == base.known:
            # No secret holds a quote, and the cuts are at quotes: none lies across a cut; the base has none.
            cleaned = redact_body(middle, known)
            if cleaned is not middle:
                middle = cleaned
                body = body[:head] + middle + body[len(body) - tail :]
        with_base = base.body and len(middle) > _LONG_MIDDLE
        compressor = _with(base.body) if with_base else self._plain
        return body, _HEADER.pack(bool(with_base), head, tail) + compressor.compress(middle)


def unpack(frame: bytes, base: bytes = b"") -> bytes:
    """The body of a frame that was packed on top of `base`."""
    if not frame:
        return b""
    kind, head, tail = _HEADER.unpack_from(frame)
    dictionary = _dictionary(base) if kind else None
    middle = zstandard.ZstdDecompressor(dict_data=dictionary).decompress(frame[_HEADER.size :])
    return base[:head] + middle + base[len(base) - tail :]


def cut(body: bytes, base: bytes) -> tuple[int, int]:
    """How much of its beginning and its end `body` shares with `base`, either cut back to a quote.

    The beginning ends after a quote, the end starts with one.
    """
    n = min(len(body), len(base))
    if not n:
        return 0, 0
    a, b = np.frombuffer(body, np.uint8), np.frombuffer(base, np.uint8)
    differs = a[:n] != b[:n]
    first = int(differs.argmax())
    head = body.rfind(b'"', 0, first if differs[first] else n) + 1
    differs = a[len(a) - (n - head) :] != b[len(b) - (n - head) :]
    last = int(differs[::-1].argmax()) if len(differs) else 0
    tail = last if len(differs) and differs[::-1][last] else len(differs)
    start = body.find(b'"', len(body) - tail)
    return head, len(body) - start if start >= 0 else 0


def _with(base: bytes) -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=_LEVEL, dict_data=_dictionary(base))


def _dictionary(base: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
