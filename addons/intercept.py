"""Addon: model calls. Reads the request, asks the engine, streams the translated answer, records it.

The order that makes the capture trustworthy: every byte but the terminal event goes out as it is made; then
the record becomes durable; then the terminal event is released.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import aiohttp
from mitmproxy import connection, http

from polar_mitm.asking import Lookups
from polar_mitm.compression import decompress, too_large
from polar_mitm.dialects.base import Dialect, Reply
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.responses_socket import SOCKET, headers_of, prewarm
from polar_mitm.dialects.routes import route
from polar_mitm.errors import PolarError
from polar_mitm.exchange import Exchange, Step
from polar_mitm.types import Wire
from polar_mitm.upstream.render import Lookup
from polar_mitm_addons.capture import RECORD_TIMEOUT_S, Capture, Session
from polar_mitm_addons.identify import PROVIDER, wants_websocket
from polar_mitm_addons.replies import stream_head, to_response
from polar_mitm_addons.streaming import ANSWER, GONE, TOO_LARGE, Answer, send
from polar_mitm_addons.websocket import Message

logger = logging.getLogger(__name__)

LINGER_S = 1.0


class Intercept:
    """One `_Call` per model call; a client that leaves cancels its calls."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._live: set[_Call] = set()
        self.websocket = True

    async def request(self, flow: http.HTTPFlow) -> None:
        if (asked := model_call(self._capture, flow)) is None:
            return
        session, dialect = asked
        exchange = self._exchange(session, DIALECTS[dialect])
        call = self._begun(_Call(self._capture, session, flow, exchange))
        flow.metadata[GONE] = call.cancel
        try:
            flow.response = await call.head()
        except Exception:  # hooks fail open: whatever happened, the harness gets an answer
            logger.exception("intercept failed")
            error = PolarError("internal", "the interceptor failed; see its log")
            flow.response = to_response(DIALECTS[dialect].encode_error(error, exchange.call.call_id))

    async def message(self, session: Session, asked: Message) -> None:
        """Answer a message that asks for a response, on the WebSocket that it came by."""
        if (prewarmed := prewarm(asked.wire)) is not None:
            prewarmed.rollout_id, prewarmed.seq = session.rollout_id, session.next_seq()
            session.responses.keep(prewarmed.dialect, prewarmed.wire)
            await self._capture.record(session, prewarmed)
            await asked.send(prewarmed.wire.response_body)
            return
        exchange = self._exchange(session, SOCKET)
        call = self._begun(_SocketCall(self._capture, session, asked, exchange))
        asked.cancel = call.cancel
        await asyncio.wait([call.task])

    def _exchange(self, session: Session, dialect: Dialect) -> Exchange:
        return Exchange(
            dialect,
            self._capture.engine,
            self._capture.settings,
            rollout_id=session.rollout_id,
            seq=session.next_seq(),
            lineage=session.lineage,
            responses=session.responses,
            answers=self._capture.answers,
            policy_version=self._capture.policy_version,
        )

    def _begun(self, call: _Call) -> _Call:
        self._live.add(call)
        self._capture.coming.add(call)
        call.task.add_done_callback(lambda _: self._live.discard(call))
        return call

    def client_disconnected(self, client: connection.Client) -> None:
        for call in self._live:
            if call.client_id == client.id:
                call.cancel()

    async def end(self, session: Session | None = None) -> None:
        """Cancel the live calls of a session, or all, and wait until they are recorded."""
        calls = [call for call in self._live if session in (None, call.session)]
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait([call.task for call in calls], timeout=2 * RECORD_TIMEOUT_S)


class _Call:
    """Drives one exchange: a task that lives from the request to the record."""

    def __init__(self, capture: Capture, session: Session, flow: http.HTTPFlow, exchange: Exchange) -> None:
        self._capture = capture
        self.session = session
        self.client_id = flow.client_conn.id
        self._flow = flow
        self._exchange = exchange
        loop = asyncio.get_running_loop()
        self._head: asyncio.Future[http.Response] = loop.create_future()
        self._begun: asyncio.Future[None] = loop.create_future()
        self._last_sent = 0.0
        self._interruptible = self._cancelled = False
        self._silence = loop.call_later(capture.settings.keepalive_s, self._keep_alive)
        self.task = loop.create_task(self._run())
        self.task.add_done_callback(self._give_up)

    async def head(self) -> http.Response:
        """The response to give: a whole one, or the head of a stream."""
        return await self._head

    def cancel(self) -> None:
        """The client is gone. Told up to three times; only the first interrupts, and not the record."""
        if not self._cancelled:
            self._cancelled = True
            if self._interruptible:  # a task that is cancelled before its first step would record nothing
                self.task.cancel()

    async def _run(self) -> None:
        end: bytes | Reply = b""
        try:
            if self._cancelled:
                raise asyncio.CancelledError
            self._interruptible = True
            end = await self._converse()
        except asyncio.CancelledError:
            self._exchange.cancel()
        except Exception as error:
            logger.exception("a call failed")
            end = self._exchange.fail(PolarError("internal", f"the interceptor failed: {error!r}"))
        self._interruptible = False
        self._silence.cancel()
        await self._record(delivered=not self._cancelled)
        await self._end(end)

    async def _end(self, end: bytes | Reply) -> None:
        """The call is recorded: let go of the last bytes."""
        if self._head.done():
            await send(self._flow, end if isinstance(end, bytes) else b"", end=True)
        elif isinstance(end, Reply):
            self._head.set_result(to_response(end))
        else:
            self._head.set_result(http.Response.make(499))  # for nobody: the client is gone

    async def _converse(self) -> bytes | Reply:
        """From the request to the last bytes, which are returned, not sent."""
        step = self._start()
        settings = self._capture.settings
        try:
            while not isinstance(step, Reply):
                if isinstance(step, Lookups):
                    url = step.url
                    found = await asyncio.gather(*(self._look_up(url, lookup) for lookup in step.lookups))
                    step = self._exchange.answered(found)
                    continue
                async with await self._post(step.url, step.body) as response:
                    if response.status != 200:
                        body = await response.content.read(1 << 16)
                        step = self._exchange.reject(response.status, body)
                        continue
                    await (self._relay if step.stream else self._next_output)(response.content)
                    await self._linger(response.content)
                    return self._exchange.finish()
            return step
        except TimeoutError:
            message = f"the engine was silent for {settings.head_timeout_s:.0f} s or more"
            return self._exchange.fail(PolarError("upstream", message))
        except (aiohttp.ClientError, OSError) as error:
            return self._exchange.fail(PolarError("upstream", f"the engine's connection failed: {error}"))

    def _start(self) -> Step:
        flow, limit = self._flow, self._capture.settings.max_body_bytes
        wire = wire_of(flow)
        if TOO_LARGE in flow.metadata:
            return self._exchange.refuse(too_large(limit), wire)
        headers = {name.lower(): value for name, value in wire.request_headers}
        try:
            raw = flow.request.raw_content or b""
            wire.request_body = raw  # kept as received where it cannot be decoded
            wire.request_body = decompress(raw, headers.get("content-encoding", ""), limit)
        except PolarError as error:
            return self._exchange.refuse(error, wire)
        flow.request.raw_content = b""  # the wire record holds it now
        return self._exchange.start(wire, headers)

    async def _look_up(self, url: str, lookup: Lookup) -> bytes | None:
        """The engine's answer to a small question; None where there is none in time."""
        try:
            async with asyncio.timeout(self._capture.settings.render_timeout_s):
                async with await self._post(url + lookup.path, lookup.body) as response:
                    return await response.read() if response.status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError):
            return None

    async def _post(self, url: str, body: bytes) -> aiohttp.ClientResponse:
        settings = self._capture.settings
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.idle_timeout_s
        )
        headers = {"content-type": "application/json"}

        async def post() -> aiohttp.ClientResponse:
            async with asyncio.timeout(settings.head_timeout_s):
                return await self._capture.http.post(
                    url, data=body, headers=headers, timeout=timeout, allow_redirects=False
                )

        try:
            return await post()
        except (aiohttp.ServerDisconnectedError, ConnectionResetError):
            return await post()  # a kept-alive connection that the engine had just closed

    async def _relay(self, body: aiohttp.StreamReader) -> None:
        """Send what comes as it comes."""
        exchange = self._exchange
        # A 200 is held back for a moment, so that an engine that breaks at once is still a 529.
        timer = asyncio.timeout(self._capture.settings.head_grace_s)
        try:
            async with timer:
                out = await self._next_output(body)
        except TimeoutError:
            if not timer.expired():
                raise
            await self._release(exchange.open(), exchange.opening())
            out = await self._next_output(body)
        if out and not self._head.done():
            await self._release(exchange.open(), out)
            out = await self._next_output(body)
        while out:
            await self._send(out)
            out = await self._next_output(body)

    async def _next_output(self, body: aiohttp.StreamReader) -> bytes:
        """What the harness gets for the engine's next bytes; b"" once there is no more to come."""
        exchange = self._exchange
        while not exchange.complete and (chunk := await body.readany()):
            out = exchange.feed(chunk)
            if exchange.ended and not self._head.done():
                return b""  # broken before anything was released: `finish` has the reply
            if out:
                return out
        return b""

    async def _linger(self, body: aiohttp.StreamReader) -> None:
        """Read on to the end, which should be here by now, so that the connection can serve again."""
        if not self._exchange.ended and not body.at_eof():
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with asyncio.timeout(LINGER_S):
                    while await body.readany():
                        pass

    async def _release(self, headers: dict[str, str], first: bytes) -> None:
        """Let mitmproxy send the head and the first bytes, and wait until it has."""
        chunked = self._flow.request.http_version == "HTTP/1.1"
        begun = self._begun
        self._flow.metadata[ANSWER] = Answer(first, lambda: begun.done() or begun.set_result(None))
        self._head.set_result(stream_head(headers, chunked=chunked))
        await self._begun
        self._last_sent = asyncio.get_running_loop().time()

    async def _send(self, data: bytes) -> None:
        if data and not await self._put(data):
            self.cancel()  # takes effect at the next await
        self._last_sent = asyncio.get_running_loop().time()

    async def _put(self, data: bytes) -> bool:
        return await send(self._flow, data)

    def _keep_alive(self) -> None:
        """A timer: when the engine has been silent for long, the harness is told that we live."""
        loop, period_s = asyncio.get_running_loop(), self._capture.settings.keepalive_s
        self._silence = loop.call_later(period_s, self._keep_alive)
        if self._begun.done() and loop.time() - self._last_sent >= period_s:
            self._pinging = loop.create_task(self._ping())

    async def _ping(self) -> None:
        await self._send(self._exchange.keepalive())

    def _give_up(self, task: asyncio.Task[None]) -> None:
        """The task is over: whoever waits for a head waits no longer."""
        self._silence.cancel()
        # mitmproxy leaves a flow to the garbage collector, and with it would be left what the flow holds.
        for key in (GONE, ANSWER):
            self._flow.metadata.pop(key, None)
        self._capture.coming.discard(self)
        if not self._head.done():
            error = None if task.cancelled() else task.exception()
            self._head.set_exception(error or RuntimeError("the call was interrupted"))

    async def _record(self, *, delivered: bool) -> None:
        self._capture.coming.discard(self)
        calls = self._exchange.records(delivered=delivered)
        self.session.num_sampled_tokens += sum(len(call.completion_token_ids) for call in calls)
        recording = [self._capture.record(self.session, call) for call in calls]
        # A task of its own costs as much as handing over the record.
        recorded = recording[0] if len(recording) == 1 else asyncio.gather(*recording)
        asyncio.get_running_loop().call_soon(self._flush)  # once they are handed over
        await recorded

    def _flush(self) -> None:
        """Where no other call is in flight, the record has no commit to share, and nothing to wait for."""
        if not self._capture.coming:
            self._capture.recorder.flush()


class _SocketCall(_Call):
    """A call whose request is a message on a WebSocket, and whose answer are others."""

    def __init__(self, capture: Capture, session: Session, asked: Message, exchange: Exchange) -> None:
        self._asked = asked
        super().__init__(capture, session, asked.flow, exchange)

    def _start(self) -> Step:
        wire = self._asked.wire
        return self._exchange.start(wire, headers_of(wire))

    async def _release(self, headers: dict[str, str], first: bytes) -> None:
        self._head.set_result(http.Response.make(200, b"", headers))
        self._begun.set_result(None)
        await self._send(first)

    async def _put(self, data: bytes) -> bool:
        return await self._asked.send(data)

    async def _ping(self) -> None:
        await self._asked.ping()

    async def _end(self, end: bytes | Reply) -> None:
        await self._asked.send(end.body if isinstance(end, Reply) else end)
        if not self._head.done():
            self._head.set_result(http.Response.make(200))


def model_call(capture: Capture, flow: http.HTTPFlow) -> tuple[Session, str] | None:
    """Whose model call a request is, and its dialect; None where it is none, or has an answer already."""
    provider = flow.metadata.get(PROVIDER)
    session = capture.session(flow.client_conn.id)
    if flow.response is not None or provider is None or session is None:
        return None
    found = route(provider, flow.request.method, flow.request.path, upgrade=wants_websocket(flow.request))
    return (session, found.dialect) if found.kind == "model" else None


def wire_of(flow: http.HTTPFlow) -> Wire:
    request = flow.request
    return Wire(
        method=request.method,
        host=request.pretty_host,
        path=request.path,
        request_headers=list(request.headers.items(multi=True)),
        http_version=request.http_version,
    )
