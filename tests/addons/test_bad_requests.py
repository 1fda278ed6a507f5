"""Requests that cannot be served: a 4xx in the provider's shape, a record, and nothing for the engine."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import weakref
import zlib
from collections.abc import AsyncIterator

import aiohttp
import brotli
import pytest
import zstandard

from polar_mitm.conformance.scripts import Answer
from polar_mitm.exchange import Exchange
from tests.support.engine_bytes import events
from tests.support.held_engine import DEADLINE_S, HeldEngine
from tests.support.rig import MESSAGES, RESPONSES, Rig, ask, post, rig, settled, until

ENGINE = "http://127.0.0.1:9"  # nobody: what these tests send must not get that far
both = pytest.mark.parametrize("url", [MESSAGES, RESPONSES], ids=["anthropic", "openai"])


async def refused(r: Rig, response: aiohttp.ClientResponse, status: int, kind: str) -> str:
    """Check that this is a provider's error, and recorded; its message."""
    assert response.status == status
    error: dict[str, str] = (await response.json())["error"]
    expected = {413: ("request_too_large", "invalid_request_error")}.get(status, ("invalid_request_error",))
    assert error["type"] in expected
    (call,) = await r.recorder.until_calls(1)
    assert (call.status, call.wire.status, call.delivered) == ("refused", status, False)
    assert call.error == f"{kind}: {error['message']}"
    assert not call.upstream_body
    return error["message"]


@both
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"\xff\xfe\x00",
        b'{"model": 5}',
        b'{"model": "m", "messages": {"role": "user"}, "input": {"a": 1}, "max_tokens": 1}',
        b'{"model": "m", "messages": [{"role": "robot", "content": ""}], "input": [{"type": 7}]}',
        b'{"model": "m", "stream": "yes", "messages": [], "input": [], "max_tokens": 1}',
        b'{"model": "m", "max_tokens": 1, "messages": ' + b"[" * 50_000,
        b'{"model": "m", "input": ' + b"[" * 50_000,
    ],
    ids=range(10),
)
async def test_malformed_or_of_wrong_types(url: str, body: bytes) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        async with box.http() as http, http.post(url, data=body) as response:
            await refused(r, response, 400, "bad_request")
        wire = r.recorder.calls[0].wire
        assert wire.request_body == body
        assert json.loads(wire.response_body)["error"]


# --- sizes ----------------------------------------------------------------------------------------------

LIMIT = 10_000


async def chunks(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


@both
@pytest.mark.parametrize("how", ["announced", "chunked"])
@pytest.mark.parametrize("size", [LIMIT + 1, 50 * LIMIT])
async def test_too_large(url: str, how: str, size: int) -> None:
    async with rig(ENGINE, max_body_bytes=LIMIT) as r:
        box = await r.box()
        data = b"x" * size
        async with box.http() as http:
            async with http.post(url, data=data if how == "announced" else chunks(data)) as response:
                assert str(LIMIT) in await refused(r, response, 413, "too_large")
            # The connection is not left in the middle of a body.
            async with http.post(url, data=b"{}") as response:
                assert response.status == 400
        assert [call.status for call in r.recorder.calls] == ["refused"] * 2
        assert r.recorder.calls[0].wire.request_body == b""


async def test_too_large_is_answered_before_all_of_it_has_come() -> None:
    async with rig(ENGINE, max_body_bytes=LIMIT) as r:
        box = await r.box()
        reader, writer = await box.connect()
        head = "POST /v1/messages HTTP/1.1\r\nhost: api.anthropic.com\r\n"
        writer.write(f"{head}content-length: 1000000000\r\n\r\nthe beginning".encode())
        status = await asyncio.wait_for(reader.readline(), DEADLINE_S)
        assert status.startswith(b"HTTP/1.1 413 ")
        writer.close()


@both
async def test_exactly_the_limit_is_served(url: str) -> None:
    async with HeldEngine() as engine, rig(engine.url, max_body_bytes=LIMIT) as r:
        box = await r.box()
        body = json.dumps(ask(url)).encode().ljust(LIMIT)
        async with box.http() as http:
            asking = asyncio.ensure_future(http.post(url, data=body))
            (await engine.next()).finish(*events(Answer(text="hi")))
            assert (await asking).status == 200


@pytest.mark.parametrize("path", ["/v1/nope", "/api/hello"])
async def test_too_large_for_other_paths(path: str) -> None:
    async with rig(ENGINE, max_body_bytes=LIMIT) as r:
        box = await r.box()
        async with (
            box.http() as http,
            http.post(f"https://api.anthropic.com{path}", data=b"x" * (LIMIT + 1)) as response,
        ):
            assert response.status in (404, 413)
        assert r.recorder.calls == []


# --- compression ----------------------------------------------------------------------------------------

ENCODERS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.compress,
    "br": brotli.compress,
    "identity": bytes,
}


@both
@pytest.mark.parametrize("coding", ENCODERS)
async def test_compressed_requests(url: str, coding: str) -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        body = json.dumps(ask(url, "héllo")).encode()
        headers = {"content-encoding": coding, "content-type": "application/json"}
        async with box.http() as http:
            asking = asyncio.ensure_future(http.post(url, data=ENCODERS[coding](body), headers=headers))
            generation = await engine.next()
            assert "héllo" in str(generation.body["messages"])
            generation.finish(*events(Answer(text="hi")))
            assert (await asking).status == 200
        assert r.recorder.calls[0].wire.request_body == body


@both
@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", b"{}"),
        ("gzip", gzip.compress(b"{}")[:-4]),
        ("zstd", b"\x28\xb5\x2f\xfd garbage"),
        ("zstd", zstandard.compress(b"{}" * 1000)[:-3]),
        ("br", b"\xff" * 10),
        ("snappy", b"{}"),
    ],
)
async def test_bad_compression(url: str, coding: str, body: bytes) -> None:
    async with rig(ENGINE) as r:
        box = await r.box()
        async with (
            box.http() as http,
            http.post(url, data=body, headers={"content-encoding": coding}) as response,
        ):
            assert coding in await refused(r, response, 400, "bad_request")
        assert r.recorder.calls[0].wire.request_body == body


@both
async def test_a_bomb_is_too_large(url: str) -> None:
    async with rig(ENGINE, max_body_bytes=LIMIT) as r:
        box = await r.box()
        bomb = gzip.compress(bytes(5_000_000))
        assert len(bomb) < LIMIT
        async with (
            box.http() as http,
            http.post(url, data=bomb, headers={"content-encoding": "gzip"}) as response,
        ):
            await refused(r, response, 413, "too_large")


# --- memory ---------------------------------------------------------------------------------------------


async def test_a_call_that_is_over_is_forgotten() -> None:
    async with HeldEngine() as engine, rig(engine.url) as r:
        box = await r.box()
        async with box.http() as http:
            alive: list[weakref.ref[Exchange]] = []
            for stream in (True, False):
                asking = post(http, MESSAGES, text="x" * 10_000, stream=stream)
                generation = await engine.next()
                (live,) = r.interceptor.chain.intercept._live
                assert live._flow.request.raw_content == b""  # the record has the only copy
                alive.append(weakref.ref(live._exchange))
                del live
                generation.finish(*events(Answer(text="hi")))
                await (await asking).read()
            await settled()  # the connection is kept open
            r.recorder.calls.clear()
            r.recorder.held.clear()
            gc.collect()
            await until(lambda: [ref() for ref in alive] == [None, None])
