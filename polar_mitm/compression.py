"""Request bodies, decompressed within a bound: a small body must not become a large one unseen."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Protocol

import zstandard

from polar_mitm.errors import PolarError

MAX_CODINGS = 3
MAX_MEMBERS = 4096


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo a `Content-Encoding` (RFC 9110, section 8.4), several applied in turn.

    Args:
        body: bytes as received.
        encoding: the header's value; "" and "identity" change nothing.
        limit: most bytes that any step may give.

    Raises:
        PolarError: `bad_request` for an unknown coding or bytes that are not that coding, `too_large`.
    """
    codings = [c for part in encoding.split(",") if (c := part.strip().lower()) not in ("", "identity")]
    if len(codings) > MAX_CODINGS:
        raise PolarError("bad_request", f"more than {MAX_CODINGS} content-encodings are not supported")
    for coding in reversed(codings):
        decode = _CODINGS.get(coding)
        if decode is None:
            raise PolarError("bad_request", f"content-encoding {coding!r} is not supported")
        try:
            body = decode(body, limit)
        except PolarError:
            raise
        except Exception as error:
            raise PolarError("bad_request", f"the body is not valid {coding}: {error}") from error
    return body


class _Inflater(Protocol):
    """What `zlib.decompressobj` and `zstandard`'s have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _inflate(body: bytes, limit: int, new: Callable[[], _Inflater], step: int, members: int = 1) -> bytes:
    """All of `body`, `step` bytes at a time, since that bounds what one step can give."""
    out, at = bytearray(), 0
    for _ in range(members):
        inflater = new()
        while not inflater.eof:
            if at >= len(body):
                raise ValueError("it ends too early")
            piece = body[at : at + step]
            at += len(piece)
            out += inflater.decompress(piece)
            if len(out) > limit:
                raise too_large(limit)
        at -= len(inflater.unused_data)
        if at == len(body):
            return bytes(out)
    raise ValueError("more bytes follow its end")


def _gzip(body: bytes, limit: int) -> bytes:
    """Members one after another (RFC 1952, section 2.2); a step gives at most 4 MB."""
    return _inflate(body, limit, lambda: zlib.decompressobj(16 + zlib.MAX_WBITS), 4096, MAX_MEMBERS)


def _deflate(body: bytes, limit: int) -> bytes:
    try:
        return _inflate(body, limit, zlib.decompressobj, 4096)
    except zlib.error:  # many senders mean the raw format
        return _inflate(body, limit, lambda: zlib.decompressobj(-zlib.MAX_WBITS), 4096)


def _zstd(body: bytes, limit: int) -> bytes:
    """Frames one after another (RFC 8878, section 3); a step gives at most 8 MB (64 blocks)."""
    # A frame in one segment has a window as large as itself; RFC 9659 asks for 8 MB at least.
    decoder = zstandard.ZstdDecompressor(max_window_size=max(limit, 8 << 20))
    return _inflate(body, limit, decoder.decompressobj, 256, MAX_MEMBERS)


def _brotli(body: bytes, limit: int) -> bytes:
    """One stream (RFC 7932); a step gives at most 25 MB, as meta-blocks of 16 MB take about 20 bytes."""
    return _inflate(body, limit, _Brotli, 32)


class _Brotli:
    unused_data = b""  # the library takes bytes after the end for an error

    def __init__(self) -> None:
        import brotli  # type: ignore[import-untyped]  # comes with mitmproxy

        self._inner = brotli.Decompressor()

    @property
    def eof(self) -> bool:
        return bool(self._inner.is_finished())

    def decompress(self, data: bytes, /) -> bytes:
        return bytes(self._inner.process(data))


def too_large(limit: int) -> PolarError:
    """The error for a body over the limit."""
    return PolarError("too_large", f"the request body is larger than the limit of {limit} bytes")


_CODINGS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "zstd": _zstd,
    "br": _brotli,
}
