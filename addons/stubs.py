"""Addon: side endpoints answered here, WebSocket upgrades turned down, unknown paths refused and recorded."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import unquote

from mitmproxy import http

from polar_mitm.compression import too_large
from polar_mitm.dialects.base import Dialect, Reply
from polar_mitm.dialects.ids import new_id
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.routes import ERROR_DIALECT, route
from polar_mitm.dialects.side_table import Side
from polar_mitm.dialects.windows import scale_for
from polar_mitm.errors import PolarError
from polar_mitm.store.redact import credentials, redact_path
from polar_mitm_addons.capture import Capture, Session
from polar_mitm_addons.counting import count
from polar_mitm_addons.identify import PROVIDER, wants_websocket
from polar_mitm_addons.intercept import wire_of
from polar_mitm_addons.replies import to_response
from polar_mitm_addons.streaming import TOO_LARGE

logger = logging.getLogger(__name__)


class Stubs:
    """Leaves model calls alone; every other request of an identified provider is answered here."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    async def request(self, flow: http.HTTPFlow) -> None:
        provider = flow.metadata.get(PROVIDER)
        session = self._capture.session(flow.client_conn.id)
        if flow.response is not None or provider is None or session is None:
            return
        request = flow.request
        found = route(provider, request.method, request.path, upgrade=wants_websocket(request))
        path = request.path.partition("?")[0]
        known = credentials(wire_of(flow))
        name = f"{request.method} {request.pretty_host}{redact_path(path, known)}"
        dialect = DIALECTS[ERROR_DIALECT.get(provider, "openai_responses")]
        if found.kind == "websocket":
            # The cheapest way to HTTP: one attempt, measured on Codex (RFC 9110, section 15.5.22).
            flow.response = http.Response.make(426, b"", {"connection": "close"})
            self._capture.egress(session, "stubbed", "websocket", name, "426: use HTTP")
        elif found.side is not None:
            side = found.side
            reply = await self._answer(session, flow, side, found.groups, dialect)
            reply.body = b"" if request.method == "HEAD" else reply.body
            flow.response = to_response(reply)
            verdict = "refused" if side.refuse else "stubbed"
            self._capture.egress(session, verdict, "path", name, f"{reply.status}: {side.name}")
        elif found.kind == "unknown":
            error = PolarError("not_found", f"{request.method} {path} is not served here")
            flow.response = to_response(dialect.encode_error(error, new_id()))
            self._capture.egress(session, "refused", "path", name, "404")

    async def _answer(
        self, session: Session, flow: http.HTTPFlow, side: Side, groups: dict[str, str], dialect: Dialect
    ) -> Reply:
        """What an entry of the table answers; an error is in the provider's shape."""
        try:
            if side.refuse:
                raise PolarError("not_found", side.refuse)
            if not side.answer and side.status >= 400:
                raise PolarError("not_found", f"there is no {side.name} here", status=side.status)
            values = self._values(flow.request, side, groups)
            if side.count:
                if TOO_LARGE in flow.metadata:
                    raise too_large(self._capture.settings.max_body_bytes)
                path, counted = side.call_path(flow.request.path, groups), DIALECTS[side.count]
                values["tokens"] = await count(self._capture, session, flow.request, side, counted, path)
            return Reply(side.status, side.body(values))
        except PolarError as error:
            return dialect.encode_error(error, new_id())
        except Exception as error:  # hooks fail open: whatever happened, the harness gets an answer
            logger.exception("side endpoint %s failed", side.name)
            failed = PolarError("internal", f"a side endpoint failed: {error!r}")
            return dialect.encode_error(failed, new_id())

    def _values(self, request: http.Request, side: Side, groups: dict[str, str]) -> dict[str, Any]:
        """What the placeholders of an answer stand for."""
        engine, settings = self._capture.engine, self._capture.settings
        values = {"model": engine.model}
        values |= {name: request.headers.get(header, name) for name, header in side.from_header.items()}
        values |= {name: unquote(value) for name, value in groups.items()}
        scale = scale_for(values["model"], request.headers, engine.max_model_len, settings)
        return {**values, "window": scale.window or engine.max_model_len or None}
