"""Which provider a host belongs to, and what each path on it is: tables, not code per path."""

from __future__ import annotations

import re
from typing import Literal

from msgspec import Struct

RouteKind = Literal["model", "websocket", "stub", "unknown"]

HOSTS: dict[str, str] = {
    "api.anthropic.com": "anthropic",
    "api.openai.com": "openai",
    "chatgpt.com": "openai",
    "generativelanguage.googleapis.com": "google",
}
"""Provider hosts: the only names that a sandbox can resolve."""

ERROR_DIALECT: dict[str, str] = {"anthropic": "anthropic", "openai": "openai_responses", "google": "gemini"}
"""The dialect in whose shape a provider's unknown paths are refused."""


class Route(Struct, frozen=True):
    """What a request is. `dialect` belongs to `model`; `status` and `body` to `stub`."""

    kind: RouteKind
    dialect: str = ""
    status: int = 404
    body: bytes = b""


_MODEL = [
    ("anthropic", "POST", r"/v1/messages", "anthropic"),
    ("openai", "POST", r"/v1/responses", "openai_responses"),
    ("openai", "POST", r"/backend-api/codex/responses", "openai_responses"),
    ("openai", "POST", r"(/[\w.-]+)*/v1/chat/completions", "openai_chat"),
    (
        "google",
        "POST",
        r"/v1(alpha|beta)?/models/[^/]+:(generate|streamGenerate)Content",
        "gemini",
    ),
]

# Side endpoints: answered here, never sent to the engine, never trained on. What is not listed gets a 404
# in the provider's shape, which every harness measured accepts for its side traffic.
_STUBS = [
    ("anthropic", "HEAD|GET", r"/api/hello", 200, b'{"message":"hello"}'),
    ("anthropic", "POST", r"/api/event_logging/.*", 200, b'{"accepted_count":0,"rejected_count":0}'),
    ("anthropic", "POST", r"/api/eval/.*", 200, b'{"features":{}}'),
    (
        "anthropic",
        "GET",
        r"/api/claude_code/organizations/metrics_enabled",
        200,
        b'{"metrics_enabled":false}',
    ),
    ("openai", "POST", r"/(otlp/)?v1/(metrics|traces|logs)", 200, b"{}"),
    ("openai", "POST", r"/backend-api/codex/analytics-events/.*", 200, b"{}"),
]

_WEBSOCKET = [("openai", r"/v1/responses|/backend-api/codex/responses")]


def route(provider: str, method: str, path: str, *, upgrade: bool = False) -> Route:
    """What `method path` on a host of `provider` is. `upgrade`: the client asks for a WebSocket."""
    path = path.partition("?")[0]
    if upgrade:
        known = any(p == provider and re.fullmatch(pattern, path) for p, pattern in _WEBSOCKET)
        return Route("websocket" if known else "unknown")
    for owner, verb, pattern, dialect in _MODEL:
        if owner == provider and verb == method and re.fullmatch(pattern, path):
            return Route("model", dialect)
    for owner, verbs, pattern, status, body in _STUBS:
        if owner == provider and method in verbs.split("|") and re.fullmatch(pattern, path):
            return Route("stub", status=status, body=b"" if method == "HEAD" else body)
    return Route("unknown")
