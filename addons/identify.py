"""Addon: which rollout and which provider is this? Everything unidentified is refused, by name."""

from __future__ import annotations

from mitmproxy import connection, http, tls

from polar_mitm_addons.capture import Capture
from polar_mitm_addons.streaming import hang_up

PROVIDER = "polar_provider"
"""`flow.metadata` key: the provider of a request that may be served."""


class Identify:
    """Refuses unknown names at the TLS handshake, else at the request."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def client_connected(self, client: connection.Client) -> None:
        self._capture.silent.add(client.id)

    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        client = data.context.client
        session = self._capture.session(client.id)
        name = data.client_hello.sni or _destination(client)
        self._capture.silent.discard(client.id)
        if session is None or self._capture.provider(name) is None:
            if session is not None:
                self._capture.egress(session, "refused", "tls", name)
            hang_up(client.id)

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        client = flow.client_conn
        self._capture.silent.discard(client.id)
        session = self._capture.session(client.id)
        host = flow.request.pretty_host
        provider = self._capture.provider(host)
        # A request inside an approved handshake may not name another host.
        if client.sni and client.sni.lower() != host.lower():
            provider = None
        if session is None or provider is None:
            if session is not None:
                self._capture.egress(session, "refused", "http", host, flow.request.method)
            flow.response = http.Response.make(403, f"{host}: not reachable from this sandbox\n")
            return
        flow.metadata[PROVIDER] = provider

    def client_disconnected(self, client: connection.Client) -> None:
        session = self._capture.session(client.id)
        if client.id in self._capture.silent and session is not None:
            self._capture.egress(session, "refused", "tcp", _destination(client), "neither TLS nor HTTP")
        self._capture.silent.discard(client.id)


def wants_websocket(request: http.Request) -> bool:
    """Other upgrades (`h2c`) may be ignored (RFC 9110, section 7.8)."""
    return request.headers.get("upgrade", "").lower() == "websocket"


def _destination(client: connection.Client) -> str:
    host, port = client.sockname[:2]
    return f"{host}:{port}"
