"""Addon: side endpoints answered here, WebSocket upgrades turned down, unknown paths refused and recorded."""

from __future__ import annotations

from mitmproxy import http

from polar_mitm.dialects.ids import new_id
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.routes import ERROR_DIALECT, route
from polar_mitm.errors import PolarError
from polar_mitm.store.redact import credentials, redact_path
from polar_mitm_addons.capture import Capture
from polar_mitm_addons.identify import PROVIDER, wants_websocket
from polar_mitm_addons.intercept import wire_of
from polar_mitm_addons.replies import to_response


class Stubs:
    """Leaves model calls alone; every other request of an identified provider is answered here."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def request(self, flow: http.HTTPFlow) -> None:
        provider = flow.metadata.get(PROVIDER)
        session = self._capture.session(flow.client_conn.id)
        if flow.response is not None or provider is None or session is None:
            return
        request = flow.request
        found = route(provider, request.method, request.path, upgrade=wants_websocket(request))
        path = request.path.partition("?")[0]
        known = credentials(wire_of(flow))
        name = f"{request.method} {request.pretty_host}{redact_path(path, known)}"
        if found.kind == "websocket":
            # The cheapest way to HTTP: one attempt, measured on Codex (RFC 9110, section 15.5.22).
            flow.response = http.Response.make(426, b"", {"connection": "close"})
            self._capture.egress(session, "stubbed", "websocket", name, "426: use HTTP")
        elif found.kind == "stub":
            flow.response = http.Response.make(found.status, found.body, {"content-type": "application/json"})
            self._capture.egress(session, "stubbed", "path", name, str(found.status))
        elif found.kind == "unknown":
            error = PolarError("not_found", f"{request.method} {path} is not served here")
            dialect = DIALECTS[ERROR_DIALECT.get(provider, "openai_responses")]
            flow.response = to_response(dialect.encode_error(error, new_id()))
            self._capture.egress(session, "refused", "path", name, "404")
