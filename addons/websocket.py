"""Addon: the Responses API over WebSocket, served here: the upgrade, the messages, and their order.

mitmproxy hands the bytes of an upgraded connection over (`streaming.Upgraded`); wsproto makes messages of
them (RFC 6455), compressed where the client offers it (RFC 7692). Responses are answered one after another,
each as one model call; see `Intercept.message`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from mitmproxy import connection, http
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import RemoteProtocolError, generate_accept_token

from polar_mitm.dialects.responses_socket import SOCKET, head_of, unknown_message
from polar_mitm.dialects.responses_state import SOCKET_METHOD
from polar_mitm.dialects.routes import route
from polar_mitm.errors import PolarError
from polar_mitm.types import Wire
from polar_mitm_addons.capture import Capture, Session
from polar_mitm_addons.identify import PROVIDER, wants_websocket
from polar_mitm_addons.streaming import UPGRADED, send

logger = logging.getLogger(__name__)

CLOSE_GRACE_S = 2.0
"""How long a client has to answer our close."""


@dataclass
class Message:
    """A message that asks for a response, and the way back. `cancel` is called when the client leaves.

    `send` takes messages as lines, and waits until the connection took them; False: the client is gone.
    """

    flow: http.HTTPFlow
    wire: Wire
    socket: Socket
    cancel: Callable[[], None] = field(default=lambda: None)

    async def send(self, lines: bytes) -> bool:
        return await self.socket.send(lines)

    async def ping(self) -> None:
        await self.socket.ping()


class Socket:
    """One connection after its upgrade: what `streaming.Upgraded` says, and messages one by one.

    Messages that wait may have `limit` bytes, together with the one that is coming in.
    """

    def __init__(self, flow: http.HTTPFlow, deflate: PerMessageDeflate | None, limit: int) -> None:
        self._flow = flow
        self.client_id = flow.client_conn.id
        self._limit = limit
        self._wire = Connection(ConnectionType.SERVER, [deflate] if deflate else [])
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._waiting: deque[bytes] = deque()
        self._came = asyncio.Event()
        self.closed = False
        self.current: Message | None = None
        self._tasks: set[asyncio.Task[bool]] = set()

    # -- from mitmproxy ------------------------------------------------------------------------------

    def received(self, data: bytes) -> bytes:
        out = b""
        with contextlib.suppress(RemoteProtocolError):
            self._wire.receive_data(data)
        for event in self._wire.events():
            if isinstance(event, CloseConnection):
                return out + self._closing(event)
            if self._wire.state is not ConnectionState.OPEN:
                continue  # we have said goodbye
            if isinstance(event, Ping):
                out += self._wire.send(event.response())
            elif isinstance(event, TextMessage | BytesMessage):
                out += self._part(event)
        return out

    def gone(self) -> None:
        self.closed = True
        self._came.set()
        if self.current is not None:
            self.current.cancel()

    # -- for the conversation ------------------------------------------------------------------------

    async def next(self) -> bytes | None:
        """The next message; None once there is none to come."""
        while not self._waiting and not self.closed:
            self._came.clear()
            await self._came.wait()
        if self.closed:
            return None
        message = self._waiting.popleft()
        self._num_bytes -= len(message)
        return message

    async def send(self, lines: bytes) -> bool:
        """Send each line as a message. False: the client is gone."""
        if self._wire.state is not ConnectionState.OPEN or self.closed:
            return False
        texts = lines.decode().split("\n")[:-1]
        data = b"".join(self._wire.send(TextMessage(text)) for text in texts)
        return not data or await send(self._flow, data)

    async def ping(self) -> None:
        if self._wire.state is ConnectionState.OPEN and not self.closed:
            await send(self._flow, self._wire.send(Ping()))

    async def close(self, code: int = CloseReason.GOING_AWAY) -> None:
        """Say goodbye, and close."""
        if self._wire.state is ConnectionState.OPEN and not self.closed:
            await send(self._flow, self._wire.send(CloseConnection(code)), end=True)

    # -- inside --------------------------------------------------------------------------------------

    def _part(self, event: TextMessage | BytesMessage) -> bytes:
        part = event.data.encode() if isinstance(event.data, str) else bytes(event.data)
        self._parts.append(part)
        self._num_bytes += len(part)
        if self._num_bytes > self._limit:
            self._parts.clear()
            self._waiting.clear()
            reason = f"at most {self._limit} bytes may wait to be answered"
            return self._goodbye(CloseReason.MESSAGE_TOO_BIG, reason)
        if event.message_finished:
            self._waiting.append(b"".join(self._parts))
            self._parts.clear()
            self._came.set()
        return b""

    def _closing(self, event: CloseConnection) -> bytes:
        """The client closes, or has broken the protocol, which wsproto tells as a close, too."""
        if self._wire.state is ConnectionState.REMOTE_CLOSING:
            self.closed = True  # the layer hangs up once this is sent
            return self._wire.send(event.response())
        if self._wire.state is ConnectionState.OPEN:
            return self._goodbye(event.code, event.reason or "")
        self.closed = True
        return b""

    def _goodbye(self, code: int, reason: str) -> bytes:
        """A close of ours. Whatever the client does then, the connection ends soon."""
        if self.current is not None:
            self.current.cancel()
        loop = asyncio.get_running_loop()
        loop.call_later(CLOSE_GRACE_S, self._hang_up)
        return self._wire.send(CloseConnection(code, reason[:100]))

    def _hang_up(self) -> None:
        if not self.closed:
            task = asyncio.get_running_loop().create_task(send(self._flow, b"", end=True))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class MessageCalls(Protocol):
    """Who answers messages. `websocket`: whether there is anybody to."""

    websocket: bool

    async def message(self, session: Session, asked: Message) -> None: ...


def accept(request: http.Request) -> tuple[http.Response, PerMessageDeflate | None] | None:
    """The 101 that accepts an upgrade, and the compression agreed on; None for a malformed request."""
    key = request.headers.get("sec-websocket-key", "")
    if not key or not key.isascii():
        return None
    if request.headers.get("sec-websocket-version") != "13" or request.http_version != "HTTP/1.1":
        return None
    headers = {
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-accept": generate_accept_token(key.encode()).decode(),
    }
    deflate = None
    for offer in request.headers.get("sec-websocket-extensions", "").split(","):
        if offer.partition(";")[0].strip() == PerMessageDeflate.name and (agreed := _deflate(offer)):
            headers["sec-websocket-extensions"], deflate = agreed
            break
    response = http.Response.make(101, b"", headers)
    response.headers.pop("content-length", None)  # RFC 9110, section 8.6
    return response, deflate


def _deflate(offer: str) -> tuple[str, PerMessageDeflate] | None:
    """The answer to an offer of compression; None for one that nobody can meet."""
    deflate = PerMessageDeflate()
    try:
        agreed = deflate.accept(offer)
    except ValueError:
        return None
    return None if not isinstance(agreed, str) else ("; ".join(filter(None, (deflate.name, agreed))), deflate)


def _message(flow: http.HTTPFlow, body: bytes) -> Wire:
    request = flow.request
    headers = list(request.headers.items(multi=True))
    return Wire(SOCKET_METHOD, request.pretty_host, request.path, headers, body)


class WebSockets:
    """Upgrades what asks for it where Responses are served; `model_calls` answers the messages.

    Comes before `Stubs`, which turns down what is left.
    """

    def __init__(self, capture: Capture, model_calls: MessageCalls) -> None:
        self._capture = capture
        self._calls = model_calls
        self.open: dict[asyncio.Task[None], Socket] = {}
        """Connections, by the task that has their conversation."""

    def request(self, flow: http.HTTPFlow) -> None:
        provider = flow.metadata.get(PROVIDER)
        session = self._capture.session(flow.client_conn.id)
        request, settings = flow.request, self._capture.settings
        if flow.response is not None or provider is None or session is None or not wants_websocket(request):
            return
        if route(provider, request.method, request.path, upgrade=True).kind != "websocket":
            return
        if not settings.websocket or not self._calls.websocket or (found := accept(request)) is None:
            return
        flow.response, deflate = found
        socket = flow.metadata[UPGRADED] = Socket(flow, deflate, settings.max_body_bytes)
        task = asyncio.get_running_loop().create_task(self._converse(session, flow, socket))
        self.open[task] = socket
        task.add_done_callback(lambda _: self.open.pop(task, None))

    def client_disconnected(self, client: connection.Client) -> None:
        """A connection that was cut is not always told to the layers."""
        for socket in self.open.values():
            if socket.client_id == client.id:
                socket.gone()

    async def _converse(self, session: Session, flow: http.HTTPFlow, socket: Socket) -> None:
        try:
            while (message := await socket.next()) is not None and not session.closed:
                await self._answer(session, flow, socket, message)
            await socket.close()
        except Exception:  # the harness sees the connection end, and tries again
            logger.exception("a WebSocket's conversation failed")
            await socket.close(CloseReason.INTERNAL_ERROR)

    async def _answer(self, session: Session, flow: http.HTTPFlow, socket: Socket, message: bytes) -> None:
        kind = head_of(message).type
        if kind != "response.create":
            name = f"{SOCKET_METHOD} {flow.request.pretty_host}{flow.request.path.partition('?')[0]}"
            self._capture.egress(session, "refused", "websocket", name, f"message {kind[:64]!r}")
            await socket.send(unknown_message(kind))
            return
        socket.current = Message(flow, _message(flow, message), socket)
        try:
            await self._calls.message(session, socket.current)
        except Exception:  # as in a hook: whatever happened, the harness gets an answer
            logger.exception("a message could not be answered")
            error = PolarError("internal", "the interceptor failed; see its log")
            await socket.send(SOCKET.encode_error(error).body)
        finally:
            socket.current = None
