"""Which host is whose, and what each path on it is."""

from __future__ import annotations

import pytest

from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.routes import ERROR_DIALECT, HOSTS, Route, route


@pytest.mark.parametrize(
    ("provider", "path", "dialect"),
    [
        ("anthropic", "/v1/messages", "anthropic"),
        ("anthropic", "/v1/messages?beta=true", "anthropic"),
        ("openai", "/v1/responses", "openai_responses"),
        ("openai", "/backend-api/codex/responses", "openai_responses"),
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
        ("anthropic", "POST", "/v1/messages/count_tokens"),
        ("anthropic", "POST", "/v1/messages/batches"),
        ("anthropic", "POST", "//v1/messages"),
        ("anthropic", "POST", "/V1/messages"),
        ("anthropic", "POST", "/v1/responses"),
        ("openai", "POST", "/v1/messages"),
        ("openai", "POST", "/v1/responses/compact"),
        ("openai", "POST", "/v1/completions"),
        ("openai", "POST", "/v1/embeddings"),
        ("openai", "GET", "/v1/responses/resp_1"),
        ("nobody", "POST", "/v1/messages"),
        ("anthropic", "PUT", "/api/hello"),
        ("openai", "POST", "/x/v1/traces"),
    ],
)
def test_what_is_not_listed_is_unknown(provider: str, method: str, path: str) -> None:
    assert route(provider, method, path) == Route("unknown")


@pytest.mark.parametrize("path", ["/v1/responses", "/backend-api/codex/responses"])
def test_a_websocket_is_known_where_codex_opens_one(path: str) -> None:
    assert route("openai", "GET", path, upgrade=True).kind == "websocket"
    assert route("anthropic", "GET", path, upgrade=True).kind == "unknown"
    assert route("openai", "GET", "/v1/realtime", upgrade=True).kind == "unknown"


def test_stubs_answer_in_json_and_head_has_no_body() -> None:
    get, head = (route("anthropic", method, "/api/hello") for method in ("GET", "HEAD"))
    assert (get.kind, get.status, get.body) == ("stub", 200, b'{"message":"hello"}')
    assert (head.kind, head.status, head.body) == ("stub", 200, b"")


def test_every_provider_has_an_error_shape() -> None:
    assert set(HOSTS.values()) == set(ERROR_DIALECT)
    assert set(ERROR_DIALECT.values()) <= set(DIALECTS)


def test_the_registry_names_its_dialects() -> None:
    assert {name: dialect.name for name, dialect in DIALECTS.items()} == {name: name for name in DIALECTS}
