"""The one ordered list of our addons."""

from __future__ import annotations

from typing import Any

from polar_mitm_addons.capture import Capture
from polar_mitm_addons.egress import Egress
from polar_mitm_addons.identify import Identify
from polar_mitm_addons.intercept import Intercept
from polar_mitm_addons.listeners import Listeners
from polar_mitm_addons.metrics import Metrics
from polar_mitm_addons.streaming import Streaming
from polar_mitm_addons.stubs import Stubs

OPTIONS: dict[str, Any] = {
    "connection_strategy": "lazy",  # never dial before a request is understood, and then never
    "upstream_cert": False,
    "rawtcp": False,
    "websocket": False,
}
"""mitmproxy's options that our addons rely on."""


class Chain:
    """Our addons over one capture, in order. mitmproxy's `NextLayer` comes before them."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.streaming = Streaming(capture.settings.max_body_bytes)
        self.listeners = Listeners(capture)
        self.intercept = Intercept(capture)
        self.metrics = Metrics()
        capture.observe = self.metrics.observe
        self.addons: list[Any] = [
            self.streaming,
            Egress(),
            Identify(capture),
            self.intercept,
            Stubs(capture),
            self.metrics,
            self.listeners,
        ]
