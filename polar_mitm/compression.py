"""Request bodies, decompressed within a bound: a small body must not become a large one unseen."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import zstandard

from polar_mitm.errors import PolarError


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo a `Content-Encoding` (RFC 9110, section 8.4), several applied in turn.

    Args:
        body: bytes as received.
        encoding: the header's value; "" and "identity" change nothing.
        limit: most bytes that any step may give.

    Raises:
        PolarError: `bad_request` for an unknown coding or bytes that are not that coding, `too_large`.
    """
    for coding in reversed([c.strip().lower() for c in encoding.split(",")]):
        if coding in ("", "identity"):
            continue
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


def _zlib(body: bytes, limit: int, wbits: int) -> bytes:
    inflater = zlib.decompressobj(wbits)
    out = inflater.decompress(body, limit + 1)
    if len(out) > limit:
        raise too_large(limit)
    if not inflater.eof:
        raise ValueError("it ends too early")
    return out


def _deflate(body: bytes, limit: int) -> bytes:
    try:
        return _zlib(body, limit, zlib.MAX_WBITS)
    except zlib.error:  # many senders mean the raw format
        return _zlib(body, limit, -zlib.MAX_WBITS)


def _zstd(body: bytes, limit: int) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body) as reader:
        out = reader.read(limit + 1)
    if len(out) > limit:
        raise too_large(limit)
    if not out and body:
        raise ValueError("it ends too early")
    return bytes(out)


def _brotli(body: bytes, limit: int) -> bytes:
    import brotli  # comes with mitmproxy

    inflater = brotli.Decompressor()
    out = bytearray()
    # The library cannot bound its output in all versions; small inputs bound what one step may give.
    for start in range(0, len(body), 256):
        out += inflater.process(body[start : start + 256])
        if len(out) > limit:
            raise too_large(limit)
    if not inflater.is_finished():
        raise ValueError("it ends too early")
    return bytes(out)


def too_large(limit: int) -> PolarError:
    """The error for a body over the limit."""
    return PolarError("too_large", f"the request body is larger than the limit of {limit} bytes")


_CODINGS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": lambda body, limit: _zlib(body, limit, 16 + zlib.MAX_WBITS),
    "x-gzip": lambda body, limit: _zlib(body, limit, 16 + zlib.MAX_WBITS),
    "deflate": _deflate,
    "zstd": _zstd,
    "br": _brotli,
}
