"""From our replies to mitmproxy's responses."""

from __future__ import annotations

from mitmproxy import http

from polar_mitm.dialects.base import Reply


def to_response(reply: Reply) -> http.Response:
    return http.Response.make(reply.status, reply.body, reply.headers)


def stream_head(headers: dict[str, str], *, chunked: bool) -> http.Response:
    """The head of a streamed 200. Only HTTP/1.1 has chunks; HTTP/1.0 ends with the connection."""
    response = http.Response.make(200, b"", headers)
    response.headers.pop("content-length", None)
    if chunked:
        response.headers["transfer-encoding"] = "chunked"
    return response
