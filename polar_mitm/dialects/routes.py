"""Which provider a host belongs to, and what each path on it is: tables, not code per path.

What is no model call is in `side/*.toml`.
"""

from __future__ import annotations

import re
from typing import Literal

from msgspec import Struct, field

from polar_mitm.dialects.side_table import SIDE, Side

RouteKind = Literal["model", "websocket", "stub", "unknown"]

HOSTS: dict[str, str] = {
    "api.anthropic.com": "anthropic",
    "api.openai.com": "openai",
    "chatgpt.com": "openai",
    "generativelanguage.googleapis.com": "google",
}
"""Provider hosts. A sandbox can resolve these, those of the settings, and `SIDE_HOSTS`; nothing else."""

SIDE_HOSTS = frozenset(SIDE) - frozenset(HOSTS.values())
"""Hosts that serve no models, and have an answer to what a harness asks them besides."""

ERROR_DIALECT: dict[str, str] = {"anthropic": "anthropic", "openai": "openai_responses", "google": "gemini"}
"""The dialect in whose shape a provider's unknown paths are refused."""


class Route(Struct, frozen=True):
    """What a request is. `dialect` belongs to `model`; `side`, and what stands in its path, to `stub`."""

    kind: RouteKind
    dialect: str = ""
    side: Side | None = None
    groups: dict[str, str] = field(default_factory=dict)


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

PROVIDER_OF: dict[str, str] = {dialect: provider for provider, _, _, dialect in _MODEL}
"""Whose API a dialect is."""

_WEBSOCKET = [("openai", r"/v1/responses|/backend-api/codex/responses")]


def owner(host: str) -> str | None:
    """Whose table a host is looked up in: a provider, the host's own, or None for one that does not exist."""
    return HOSTS.get(host) or (host if host in SIDE_HOSTS else None)


def route(provider: str, method: str, path: str, *, upgrade: bool = False) -> Route:
    """What `method path` on a host of `provider` is. `upgrade`: the client asks for a WebSocket."""
    path = path.partition("?")[0]
    if upgrade:
        known = any(p == provider and re.fullmatch(pattern, path) for p, pattern in _WEBSOCKET)
        return Route("websocket" if known else "unknown")
    for name, verb, pattern, dialect in _MODEL:
        if name == provider and verb == method and re.fullmatch(pattern, path):
            return Route("model", dialect)
    for side in SIDE.get(provider, ()):
        if (groups := side.match(method, path)) is not None:
            return Route("stub", side=side, groups=groups)
    return Route("unknown")
