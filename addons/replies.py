"""From our replies to mitmproxy's responses."""

from __future__ import annotations

import time

from mitmproxy import http
from mitmproxy.net.http import status_codes

from polar_mitm.dialects.base import Reply


def to_response(reply: Reply) -> http.Response:
    response = _made(reply.status, reply.headers)
    response.content = reply.body  # which sets its length, too
    return response


def stream_head(headers: dict[str, str], *, chunked: bool) -> http.Response:
    """The head of a streamed 200. Only HTTP/1.1 has chunks; HTTP/1.0 ends with the connection."""
    response = _made(200, headers)
    response.headers.pop("content-length", None)
    if chunked:
        response.headers["transfer-encoding"] = "chunked"
    return response


def _made(status: int, headers: dict[str, str]) -> http.Response:
    """`http.Response.make` without its exceptions: mitmproxy checks the types of fields by catching them, and
    each keeps the frames of the whole stack, and so all of a call, until garbage is next collected.
    """
    reason = status_codes.RESPONSES.get(status, "").encode()
    fields = http.Headers([(name.encode(), value.encode()) for name, value in headers.items()])
    now, nothing = time.time(), http.Headers()
    response = http.Response(b"HTTP/1.1", status, reason, fields, b"", nothing, now, now)
    response.trailers = None
    return response
