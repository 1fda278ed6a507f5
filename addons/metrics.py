"""Addon: counters and timings for Prometheus, in a registry of its own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server

from polar_mitm.types import ModelCall

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.5, 1, 5, 20, 60, 300)


class Metrics:
    """`observe` a call; `serve` the registry on a loopback port for a scraper."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "polar_mitm_calls", "Model calls", ["dialect", "status"], registry=self.registry
        )
        self._tokens = Counter("polar_mitm_tokens", "Tokens", ["kind"], registry=self.registry)
        self._first = Histogram(
            "polar_mitm_first_token_seconds",
            "Request to first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._whole = Histogram(
            "polar_mitm_call_seconds", "Request to end", buckets=_SECONDS, registry=self.registry
        )
        self._server: Any = None

    def observe(self, call: ModelCall) -> None:
        self._calls.labels(call.dialect, call.status).inc()
        self._tokens.labels("prompt").inc(len(call.prompt_token_ids))
        self._tokens.labels("sampled").inc(len(call.completion_token_ids))
        if call.first_token_at is not None:
            self._first.observe(call.first_token_at - call.started_at)
        if call.ended_at is not None:
            self._whole.observe(call.ended_at - call.started_at)

    def serve(self, port: int) -> int:
        """Answer scrapers on 127.0.0.1:`port` until `done`; the port, which for 0 is a free one."""
        self._server, self._thread = start_http_server(port, "127.0.0.1", self.registry)
        return int(self._server.server_port)

    def done(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
