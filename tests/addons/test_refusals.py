"""What is no model call: refused or answered by a stub, and recorded under the name that a person knows."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable

import aiohttp
import pytest

from polar_mitm.conformance.scripts import Answer
from polar_mitm_addons import listeners
from polar_mitm_addons.capture import MAX_EVENTS_PER_NAME, MAX_NAMES
from polar_mitm_addons.identify import Identify
from polar_mitm_addons.intercept import Intercept
from polar_mitm_addons.streaming import Streaming
from polar_mitm_addons.stubs import Stubs
from tests.support.engine_bytes import events
from tests.support.held_engine import DEADLINE_S, HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, Box, Rig, ask, post, rig, settled

ENGINE = "http://127.0.0.1:9"  # nobody: what these tests send must not get that far


async def said(r: Rig, count: int = 1) -> list[tuple[str, str, str]]:
    """The recorded events as (verdict, layer, name)."""
    found = await r.recorder.until_events(count)
    assert len(found) == count and {event.rollout_id for event in found} == {"r1"}
    return [(event.verdict, event.layer, event.name) for event in found]


async def talk(box: Box, data: bytes, *, tls: str | None = None) -> bytes:
    """Send bytes; all that comes back until the other side closes."""
    reader, writer = await box.connect(tls)
    try:
        writer.write(data)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), DEADLINE_S)
    finally:
        writer.close()


# --- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evil.example", "api.anthropic.com.evil.example", "anthropic.com"])
async def test_an_unknown_name_in_the_tls_handshake(name: str) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        with pytest.raises((ConnectionError, ssl.SSLError, asyncio.IncompleteReadError)):
            await box.connect(name)
        assert await said(r) == [("refused", "tls", name)]
        assert box.session.refused == {name: 1}


async def test_tls_without_a_name() -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await box.connect("127.0.0.1")  # no SNI for an address (RFC 6066, section 3)
        assert await said(r) == [("refused", "tls", f"127.0.0.1:{box.port}")]


@pytest.mark.parametrize("host", ["evil.example", "api.openai.com"])
async def test_another_host_inside_an_approved_handshake(host: str) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        request = f"GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
        answer = await talk(box, request, tls="api.anthropic.com")
        assert answer.startswith(b"HTTP/1.1 403 ") and host.encode() in answer
        assert await said(r) == [("refused", "http", host)]


@pytest.mark.parametrize(
    ("request_line", "name"),
    [
        ("GET / HTTP/1.1\r\nhost: evil.example", "evil.example"),
        ("POST /v1/messages HTTP/1.1\r\nhost: evil.example:80\r\ncontent-length: 0", "evil.example"),
        ("GET / HTTP/1.1\r\nhost: 93.184.216.34", "93.184.216.34"),
        ("GET / HTTP/1.0", "127.0.0.1"),
    ],
)
async def test_plain_http_to_an_unknown_host(request_line: str, name: str) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        answer = await talk(box, f"{request_line}\r\nconnection: close\r\n\r\n".encode())
        assert answer.split(b" ")[1] == b"403"
        assert await said(r) == [("refused", "http", name)]


@pytest.mark.parametrize(
    "request_line",
    ["CONNECT evil.example:443 HTTP/1.1\r\nhost: evil.example:443", "GET http://evil.example/ HTTP/1.1"],
)
async def test_a_harness_that_takes_it_for_a_proxy(request_line: str) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        answer = await talk(box, f"{request_line}\r\nconnection: close\r\n\r\n".encode())
        assert answer.split(b" ")[1] in (b"400", b"403")
        ((verdict, _, name),) = await said(r)
        assert verdict == "refused" and name


async def test_a_provider_over_plain_http_is_served_all_the_same() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            asking = asyncio.ensure_future(
                http.post("http://api.anthropic.com/v1/messages", json=ask(MESSAGES))
            )
            (await engine.next()).finish(*events(Answer(text="hi")))
            assert b"message_stop" in await (await asking).read()


@pytest.mark.parametrize("host", ["API.Anthropic.com", "api.anthropic.com:443", "api.anthropic.com"])
async def test_a_name_may_be_written_in_several_ways(host: str) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        request = f"GET /api/hello HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
        assert (await talk(box, request, tls="api.anthropic.com")).startswith(b"HTTP/1.1 200 ")


async def test_more_hosts_by_configuration() -> None:
    async with HeldEngine() as engine, rig(engine.url, hosts={"llm.corp.example": "anthropic"}) as r:
        box = await r.box()
        async with box.http() as http:
            asking = asyncio.ensure_future(
                http.post("https://llm.corp.example/v1/messages", json=ask(MESSAGES))
            )
            (await engine.next()).finish(*events(Answer(text="hi")))
            assert b"message_stop" in await (await asking).read()
        assert r.recorder.calls[0].wire.host == "llm.corp.example"


# --- bytes that are no HTTP -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"\x00\x01\x02\x03" * 100 + b"\r\n\r\n", b"EHLO me\r\n\r\n"],
)
async def test_bytes_that_are_no_http(data: bytes) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        await talk(box, data)
        assert await said(r) == [("refused", "tcp", f"127.0.0.1:{box.port}")]


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"\x16\x03\x01\x02\x00\x01", b"\r\n\r\n\r\n"])
async def test_a_silent_client_is_dropped(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "SILENCE_TIMEOUT_S", 0.05)
    async with rig(ENGINE) as r:
        box = await r.box()
        await talk(box, data)  # returns once the interceptor has closed
        assert await said(r) == [("refused", "tcp", f"127.0.0.1:{box.port}")]


async def test_a_client_that_spoke_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "SILENCE_TIMEOUT_S", 0.05)
    async with rig(ENGINE) as r:
        box = await r.box()
        async with box.http() as http:
            for _ in range(2):
                async with http.get("https://api.anthropic.com/api/hello") as response:
                    assert response.status == 200
                await asyncio.sleep(0.2)
            assert len(http.connector._conns) == 1  # type: ignore[union-attr]


# --- paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "url", "error_type"),
    [
        ("GET", "https://api.anthropic.com/v1/organizations?limit=5", "not_found_error"),
        ("GET", MESSAGES, "not_found_error"),
        ("POST", "https://api.anthropic.com/v1/messages/", "not_found_error"),
        ("POST", "https://api.anthropic.com/v1/responses", "not_found_error"),
        ("POST", "https://api.openai.com/v1/messages", "invalid_request_error"),
        ("POST", "https://api.openai.com/v1/dreams", "invalid_request_error"),
        ("DELETE", "https://api.openai.com/v1/responses/resp_1", "invalid_request_error"),
        ("POST", "https://chatgpt.com/backend-api/codex/responses/compact", "invalid_request_error"),
    ],
)
async def test_an_unknown_path_is_a_404_in_the_providers_shape(
    method: str, url: str, error_type: str
) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        async with box.http() as http, http.request(method, url, data=b"{}") as response:
            assert response.status == 404
            error = (await response.json())["error"]
            assert error["type"] == error_type and method in error["message"]
        path = url.removeprefix("https://").partition("?")[0]
        assert await said(r) == [("refused", "path", f"{method} {path}")]
        assert r.recorder.calls == []


@pytest.mark.parametrize(
    ("method", "url", "body"),
    [
        ("HEAD", "https://api.anthropic.com/api/hello", b""),
        ("GET", "https://api.anthropic.com/api/hello", b'{"message":"hello"}'),
        (
            "POST",
            "https://api.anthropic.com/api/event_logging/v2/batch",
            b'{"accepted_count":0,"rejected_count":0}',
        ),
        ("POST", "https://api.openai.com/v1/traces", b"{}"),
        ("POST", "https://chatgpt.com/backend-api/codex/analytics-events/events", b"{}"),
    ],
)
async def test_side_endpoints_are_answered_here(method: str, url: str, body: bytes) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        async with box.http() as http, http.request(method, url) as response:
            assert (response.status, await response.read()) == (200, body)
            assert response.headers["content-type"] == "application/json"
        assert await said(r) == [("stubbed", "path", f"{method} {url.removeprefix('https://')}")]
        assert r.recorder.calls == [] and box.session.refused == {}


async def test_a_refused_path_keeps_no_credential_of_its_request() -> None:
    key = "the-key-of-a-harness"
    async with rig(ENGINE) as r:
        box = await r.box()
        url = f"https://api.anthropic.com/v1/keys/{key}"
        async with box.http() as http, http.get(url, headers={"x-api-key": key}) as response:
            assert response.status == 404
        ((_, _, name),) = await said(r)
    assert name.startswith("GET api.anthropic.com/v1/keys/<redacted:") and key not in name


async def test_a_websocket_is_told_to_use_http() -> None:
    async with rig(ENGINE, websocket=False) as r:
        box = await r.box()
        async with box.http() as http:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(RESPONSES)
            assert refused.value.status == 426
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect("https://api.openai.com/v1/realtime")
            assert refused.value.status == 404
        assert await said(r, 2) == [
            ("stubbed", "websocket", "GET api.openai.com/v1/responses"),
            ("refused", "path", "GET api.openai.com/v1/realtime"),
        ]


async def test_an_upgrade_to_anything_else_is_ignored() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            headers = {"upgrade": "h2c", "connection": "upgrade, http2-settings"}
            asking = asyncio.ensure_future(http.post(RESPONSES, json=ask(RESPONSES), headers=headers))
            (await engine.next()).finish(*events(Answer(text="hi")))
            assert b"response.completed" in await (await asking).read()


async def test_a_loop_of_refusals_is_counted_but_not_recorded_for_ever() -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        capture = r.interceptor.capture
        for _ in range(MAX_EVENTS_PER_NAME + 50):
            capture.egress(box.session, "refused", "dns", "loop.example")
        assert len(r.recorder.events) == MAX_EVENTS_PER_NAME
        assert box.session.refused["loop.example"] == MAX_EVENTS_PER_NAME + 50
        for n in range(2 * MAX_NAMES):
            capture.egress(box.session, "refused", "dns", f"{n}.example" + "x" * 1000)
        assert len(box.session.refused) == MAX_NAMES + 1
        assert len(r.recorder.events) == 2 * MAX_EVENTS_PER_NAME + MAX_NAMES - 1
        assert max(len(event.name) for event in r.recorder.events) == 512


# --- hooks that fail ------------------------------------------------------------------------------------


def broken(*args: object) -> None:
    raise ZeroDivisionError("a bug")


HOOKS: list[tuple[type, str]] = [
    (Identify, "tls_clienthello"),
    (Identify, "requestheaders"),
    (Identify, "client_disconnected"),
    (Intercept, "request"),
    (Intercept, "client_disconnected"),
    (Stubs, "request"),
    (Streaming, "next_layer"),
]


@pytest.mark.parametrize(("addon", "hook"), HOOKS, ids=lambda x: getattr(x, "__name__", x))
async def test_a_hook_that_raises_opens_no_door(
    addon: type, hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mitmproxy would go on and dial; the end of `rig` checks that it has not.
    monkeypatch.setattr(addon, hook, broken)
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        for host, path in (
            ("api.anthropic.com", "/v1/messages"),
            ("api.anthropic.com", "/v1/nope"),
            ("evil.example", "/"),
        ):
            head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            for tls in (None, host):
                with_error = await asyncio.gather(talk(box, head.encode(), tls=tls), return_exceptions=True)
                (answer,) = with_error
                refused = not isinstance(answer, bytes) or answer.split(b" ")[1] in (
                    b"400",
                    b"403",
                    b"404",
                    b"502",
                )
                assert refused, answer
        assert engine.connections == []
        await settled()


@pytest.mark.parametrize("fail", [lambda call: broken(), lambda call: asyncio.sleep(3600)])
async def test_an_interceptor_that_fails_in_a_call_answers(
    fail: Callable[[object], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with HeldEngine() as engine, rig(engine.url, head_timeout_s=0.3) as r:
        monkeypatch.setattr(r.interceptor.capture.http, "post", lambda *a, **k: fail(None))
        box = await r.box()
        async with box.http() as http:
            response = await post(http, MESSAGES)
            error = json.loads(await response.read())
            assert response.status in (500, 529) and error["type"] == "error"
        assert r.recorder.calls[0].status == "failed"
