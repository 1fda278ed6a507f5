"""An embedded interceptor with listeners on the loopback, and clients that take them for the providers.

async with HeldEngine() as engine, rig(engine.url) as r:
    box = await r.box()                       # what a sandbox is to the interceptor
    async with box.http() as http, http.post(MESSAGES, json=...) as response: ...
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast
from unittest import mock

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from mitmproxy import certs
from mitmproxy.proxy import server

from polar_mitm.config import Settings
from polar_mitm.store import Recorder
from polar_mitm.types import Rollout
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm_addons.capture import Capture, Session
from polar_mitm_addons.chain import ModelCalls
from polar_mitm_addons.intercept import Intercept
from polar_mitm_addons.interceptor import Interceptor
from tests.support.held_engine import DEADLINE_S
from tests.support.recorder import MemoryRecorder

MESSAGES = "https://api.anthropic.com/v1/messages?beta=true"
RESPONSES = "https://api.openai.com/v1/responses"


def ask(url: str, text: str = "go", *, stream: bool = True, **fields: Any) -> dict[str, Any]:
    """A small request to the model endpoint at `url`."""
    if url == MESSAGES:
        messages = [{"role": "user", "content": text}]
        return {"model": "claude-x", "max_tokens": 1000, "messages": messages, "stream": stream, **fields}
    return {"model": "gpt-x", "input": text, "stream": stream, **fields}


def listen() -> tuple[socket.socket, int]:
    """A listening socket on the loopback, and its port."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=256)
    return sock, sock.getsockname()[1]


def trusting(ca_pem: bytes, alpn: list[str] | None = None) -> ssl.SSLContext:
    """A context that trusts nothing but this CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca_pem.decode())
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


class _Everywhere(AbstractResolver):
    """Every name is the listener."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        found = {"hostname": host, "host": "127.0.0.1", "port": self._port, "family": socket.AF_INET}
        return [cast(ResolveResult, {**found, "proto": 0, "flags": 0})]

    async def close(self) -> None:
        pass


def http_at(port: int, ca_pem: bytes) -> aiohttp.ClientSession:
    """A client that finds the listener at `port` behind every name."""
    connector = aiohttp.TCPConnector(resolver=_Everywhere(port), ssl=trusting(ca_pem), limit=0)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)


class Box:
    """One rollout and its listener."""

    def __init__(self, interceptor: Interceptor, session: Session, rollout: Rollout, port: int) -> None:
        self.interceptor = interceptor
        self.session = session
        self.rollout = rollout
        self.port = port

    def http(self) -> aiohttp.ClientSession:
        """A client in the box."""
        return http_at(self.port, self.interceptor.ca_pem)

    async def connect(
        self, name: str | None = "api.anthropic.com", *, alpn: list[str] | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection: TLS to `name`, or plain TCP for None."""
        if name is None:
            return await asyncio.open_connection("127.0.0.1", self.port)
        context = trusting(self.interceptor.ca_pem, alpn)
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name)

    async def close(self) -> None:
        """End the rollout."""
        self.rollout.status = "completed"
        await self.interceptor.close_rollout(self.session, self.rollout)


class Rig:
    """A running interceptor and what it records."""

    def __init__(self, interceptor: Interceptor, recorder: MemoryRecorder) -> None:
        self.interceptor = interceptor
        self.recorder = recorder

    async def box(self, rollout_id: str = "r1") -> Box:
        rollout = Rollout(rollout_id)
        session = await self.interceptor.open_rollout(rollout)
        sock, port = listen()
        await self.interceptor.serve(session, [sock])
        return Box(self.interceptor, session, rollout, port)


_create_ca = functools.cache(certs.create_ca)  # a new key for each interceptor costs half of a test's time


class _Asyncio:
    """`asyncio` as mitmproxy sees it: whatever it dials is noted, and refused."""

    def __init__(self) -> None:
        self.dialled: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def open_connection(self, *address: Any, **options: Any) -> None:
        self.dialled.append(address)
        raise OSError("a test's interceptor dials nobody")


@asynccontextmanager
async def rig(
    engine_url: str,
    store: Recorder | None = None,
    *,
    engine: EngineInfo | None = None,
    model_calls: Callable[[Capture], ModelCalls] = Intercept,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """An interceptor in front of the engine at `engine_url`, which is not probed; `engine` says what it can.

    It records into `store`, or into a `MemoryRecorder`. Whatever a test does, mitmproxy itself must never
    open a connection: the end of the block checks it.
    """
    recorder = MemoryRecorder()
    info = engine or EngineInfo(engine_url, "scripted", max_model_len=1 << 20, policy_version="scripted@1")
    config = Settings(**({"head_grace_s": 0.02} | settings))
    watched = _Asyncio()
    with mock.patch.object(server, "asyncio", watched), mock.patch.object(certs, "create_ca", _create_ca):
        async with Interceptor(config, info, store or cast(Recorder, recorder), model_calls) as interceptor:
            yield Rig(interceptor, recorder)
    assert watched.dialled == []


# --- waiting --------------------------------------------------------------------------------------------


async def settled() -> None:
    """Everything that was ready to run has run: what has not happened by now is being waited for."""
    for _ in range(50):
        await asyncio.sleep(0.002)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what has no event of its own."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


# --- asking, and reading a stream ----------------------------------------------------------------------


def post(http: aiohttp.ClientSession, url: str, **fields: Any) -> asyncio.Future[aiohttp.ClientResponse]:
    """A request under way: the engine may be played before its answer is awaited."""
    return asyncio.ensure_future(http.post(url, json=ask(url, **fields)))


async def next_event(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The next SSE event's data; {} at the end of the stream."""
    block = await asyncio.wait_for(response.content.readuntil(b"\n\n"), DEADLINE_S)
    data = [line[6:] for line in block.split(b"\n") if line.startswith(b"data: ")]
    return cast(dict[str, Any], json.loads(data[0])) if data else {}


async def read_until(
    response: aiohttp.ClientResponse, wanted: str | Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Events up to the first wanted one (a type, or a test), which is the last of the list."""
    seen: list[dict[str, Any]] = []
    while event := await next_event(response):
        seen.append(event)
        if event["type"] == wanted if isinstance(wanted, str) else wanted(event):
            return seen
    raise AssertionError(f"the stream ended without {wanted}: {seen}")


def says(text: str) -> Callable[[dict[str, Any]], bool]:
    """Is this the delta, of either provider, with exactly this text?"""

    def is_it(event: dict[str, Any]) -> bool:
        delta = event.get("delta")
        return delta == text if isinstance(delta, str) else bool(delta and delta.get("text") == text)

    return is_it
