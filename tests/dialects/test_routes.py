"""Which host is whose, and what each path on it is."""

from __future__ import annotations

import pytest

from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.routes import ERROR_DIALECT, HOSTS, PROVIDER_OF, SIDE_HOSTS, Route, owner, route


@pytest.mark.parametrize(
    ("provider", "path", "dialect"),
    [
        ("anthropic", "/v1/messages", "anthropic"),
        ("anthropic", "/v1/messages?beta=true", "anthropic"),
        ("openai", "/v1/responses", "openai_responses"),
        ("openai", "/backend-api/codex/responses", "openai_responses"),
        ("openai", "/v1/chat/completions", "openai_chat"),
        ("openai", "/compatible-mode/v1/chat/completions", "openai_chat"),
        ("openai", "/api/v1/chat/completions", "openai_chat"),
        ("google", "/v1beta/models/gemini-3.8-flash:generateContent", "gemini"),
        ("google", "/v1/models/gemini-3.8-flash:streamGenerateContent?alt=sse", "gemini"),
    ],
)
def test_model_calls(provider: str, path: str, dialect: str) -> None:
    assert route(provider, "POST", path) == Route("model", dialect)
    assert dialect in DIALECTS


@pytest.mark.parametrize(
    ("provider", "method", "path"),
    [
        ("anthropic", "GET", "/v1/messages"),
        ("anthropic", "post", "/v1/messages"),
        ("anthropic", "POST", "/v1/messages/"),
        ("anthropic", "POST", "//v1/messages"),
        ("anthropic", "POST", "/V1/messages"),
        ("anthropic", "POST", "/v1/responses"),
        ("anthropic", "POST", "/v1/models"),
        ("anthropic", "POST", "/v1/messages/count_tokens/x"),
        ("openai", "POST", "/v1/messages"),
        ("openai", "POST", "/v1/responses/compact"),
        ("openai", "GET", "/v1/responses/resp_1"),
        ("openai", "GET", "/v1/responses/input_tokens"),
        ("openai", "POST", "/x/v1/traces"),
        ("google", "POST", "/v1beta/models/a/b:countTokens"),
        ("google", "GET", "/v2/models"),
        ("nobody", "POST", "/v1/messages"),
        ("anthropic", "PUT", "/api/hello"),
        ("play.googleapis.com", "POST", "/v1beta/models/gemini-3.8-flash:generateContent"),
        ("ab.chatgpt.com", "POST", "/v1/responses"),
    ],
)
def test_what_is_not_listed_is_unknown(provider: str, method: str, path: str) -> None:
    assert route(provider, method, path) == Route("unknown")


@pytest.mark.parametrize("path", ["/v1/responses", "/backend-api/codex/responses"])
def test_a_websocket_is_known_where_codex_opens_one(path: str) -> None:
    assert route("openai", "GET", path, upgrade=True).kind == "websocket"
    assert route("anthropic", "GET", path, upgrade=True).kind == "unknown"
    assert route("openai", "GET", "/v1/realtime", upgrade=True).kind == "unknown"
    assert route("ab.chatgpt.com", "GET", path, upgrade=True).kind == "unknown"


@pytest.mark.parametrize(
    ("provider", "method", "path", "name", "groups"),
    [
        ("anthropic", "HEAD", "/api/hello", "is it there?", {}),
        ("anthropic", "POST", "/v1/messages/count_tokens?beta=true", "token count", {}),
        ("anthropic", "GET", "/v1/models?limit=5", "model list", {}),
        ("anthropic", "GET", "/v1/models/claude-x", "one model", {"model": "claude-x"}),
        ("openai", "GET", "/api/v1/models/qwen/qwen3", "one model", {"model": "qwen/qwen3"}),
        (
            "google",
            "POST",
            "/v1beta/models/gemini-x:countTokens",
            "token count",
            {"version": "/v1beta", "model": "gemini-x"},
        ),
        ("openai", "POST", "/v1/embeddings", "embeddings", {}),
        ("google", "POST", "/v1beta/models/e:batchEmbedContents", "embeddings", {}),
        ("play.googleapis.com", "POST", "/log?format=json", "telemetry of Gemini CLI", {}),
    ],
)
def test_side_endpoints(provider: str, method: str, path: str, name: str, groups: dict[str, str]) -> None:
    found = route(provider, method, path)
    assert found.kind == "stub" and found.side is not None
    assert (found.side.name, found.groups) == (name, groups)


def test_every_provider_has_an_error_shape() -> None:
    assert set(HOSTS.values()) == set(ERROR_DIALECT)
    assert set(ERROR_DIALECT.values()) <= set(DIALECTS)
    assert set(PROVIDER_OF) == set(DIALECTS) and set(PROVIDER_OF.values()) == set(ERROR_DIALECT)


def test_hosts_are_denied_by_default() -> None:
    assert owner("api.anthropic.com") == "anthropic"
    assert owner("play.googleapis.com") == "play.googleapis.com"
    for name in (
        "",
        "anthropic",
        "openai",
        "google",
        "googleapis.com",
        "x.play.googleapis.com",
        "github.com",
    ):
        assert owner(name) is None
    assert all("." in host and host == host.lower() for host in SIDE_HOSTS)


def test_the_registry_names_its_dialects() -> None:
    assert {name: dialect.name for name, dialect in DIALECTS.items()} == {name: name for name in DIALECTS}
