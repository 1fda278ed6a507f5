"""From our replies to mitmproxy's responses."""

from __future__ import annotations

import time

from mitmproxy import http

from polar_mitm.dialects.base import Reply


def to_response(reply: Reply) -> http.Response:
    return http.Response.make(reply.status, reply.body, reply.headers)


def stream_head(headers: dict[str, str], *, chunked: bool) -> http.Response:
    """The head of a streamed 200. Only HTTP/1.1 has chunks; HTTP/1.0 ends with the connection."""
    fields = [
        (name.encode(), value.encode()) for name, value in headers.items() if name.lower() != "content-length"
    ]
    if chunked:
        fields.append((b"transfer-encoding", b"chunked"))
    # mitmproxy checks types by catching exceptions: a None makes one, whose frames are all of the stack, and
    # with them the whole call stays in memory until garbage is next collected.
    now, none = time.time(), http.Headers()
    response = http.Response(b"HTTP/1.1", 200, b"OK", http.Headers(fields), b"", none, now, now)
    response.trailers = None
    return response
