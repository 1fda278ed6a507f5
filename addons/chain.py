"""The one ordered list of our addons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mitmproxy import connection, http

from polar_mitm_addons.capture import Capture, Session
from polar_mitm_addons.egress import Egress
from polar_mitm_addons.identify import Identify
from polar_mitm_addons.intercept import Intercept
from polar_mitm_addons.listeners import Listeners
from polar_mitm_addons.metrics import Metrics
from polar_mitm_addons.streaming import Streaming
from polar_mitm_addons.stubs import Stubs
from polar_mitm_addons.websocket import MessageCalls, WebSockets

OPTIONS: dict[str, Any] = {
    "connection_strategy": "lazy",  # never dial before a request is understood, and then never
    "upstream_cert": False,
    "rawtcp": False,
    "websocket": False,
}
"""mitmproxy's options that our addons rely on."""


class ModelCalls(MessageCalls, Protocol):
    """The addon that answers model calls: `Intercept`, or in a replay `ServeRecorded`."""

    async def request(self, flow: http.HTTPFlow) -> None: ...

    def client_disconnected(self, client: connection.Client) -> None: ...

    async def end(self, session: Session | None = None) -> None: ...


class Chain:
    """Our addons over one capture, in order. mitmproxy's `NextLayer` comes before them."""

    def __init__(self, capture: Capture, model_calls: Callable[[Capture], ModelCalls] = Intercept) -> None:
        self.capture = capture
        self.streaming = Streaming(capture.settings.max_body_bytes)
        self.identify = Identify(capture)
        self.listeners = Listeners(capture)
        self.intercept = model_calls(capture)
        self.websockets = WebSockets(capture, self.intercept)
        self.metrics = Metrics()
        capture.observe = self.metrics.observe
        self.addons: list[Any] = [
            self.streaming,
            Egress(),
            self.identify,
            self.intercept,
            self.websockets,
            Stubs(capture),
            self.metrics,
            self.listeners,
        ]
