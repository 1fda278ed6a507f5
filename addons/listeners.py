"""Addon: accepts connections on listening sockets that were made inside sandboxes and passed to us.

Which listener accepted a connection says whose it is: a sandbox cannot spoof that, and needs no address
plan. The sockets live in the sandbox's network namespace, the accepting process in its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field

from mitmproxy import ctx
from mitmproxy.proxy import layers, mode_specs
from mitmproxy.proxy.mode_servers import ProxyConnectionHandler

from polar_mitm_addons.capture import Capture, Session
from polar_mitm_addons.dns import answer
from polar_mitm_addons.streaming import hang_up
from polar_mitm_addons.writer import CoalescingWriter

SILENCE_TIMEOUT_S = 30.0
"""A client that has neither begun TLS nor made a request after this long is dropped."""


@dataclass
class _Served:
    servers: list[asyncio.Server] = field(default_factory=list)
    resolvers: list[socket.socket] = field(default_factory=list)


class Listeners:
    """`serve` a session's sockets until `close`."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.handler: type[ProxyConnectionHandler] = ProxyConnectionHandler
        self._served: dict[str, _Served] = {}

    async def serve(self, session: Session, sockets: list[socket.socket]) -> None:
        """Take over listening TCP sockets and bound UDP sockets (resolvers).

        Raises:
            ValueError: the rollout is being served already.
        """
        if session.rollout_id in self._served:
            raise ValueError(f"rollout {session.rollout_id} is being served already")
        served = self._served[session.rollout_id] = _Served()
        loop = asyncio.get_running_loop()
        for sock in sockets:
            sock.setblocking(False)
            if sock.type == socket.SOCK_STREAM:
                served.servers.append(
                    await asyncio.start_server(
                        lambda r, w: self._client(session, r, w), sock=sock, backlog=512
                    )
                )
            else:
                loop.add_reader(sock, self._resolve, session, sock)
                served.resolvers.append(sock)

    async def close(self, session: Session) -> None:
        """Stop accepting; drop what is left of the session's connections."""
        served = self._served.pop(session.rollout_id, None)
        if served is None:
            return
        for sock in served.resolvers:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        for server in served.servers:
            server.close()
        for client_id, owner in list(self._capture.clients.items()):
            if owner is session:
                hang_up(client_id)

    def done(self) -> None:
        for served in self._served.values():
            for sock in served.resolvers:
                sock.close()
            for server in served.servers:
                server.close()

    async def _client(
        self, session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if session.closed:  # it was accepted before the listener closed
            writer.close()
            return
        mode = mode_specs.ProxyMode.parse("transparent")
        handler = self.handler(ctx.master, reader, CoalescingWriter(writer), ctx.options, mode)
        context = handler.layer.context
        handler.layer = layers.modes.TransparentProxy(context)
        # Where the client meant to go: the sandbox makes every address local, so the socket knows.
        host, port = writer.get_extra_info("sockname")[:2]
        context.client.sockname = context.server.address = (host.removeprefix("::ffff:"), port)
        client_id = context.client.id
        self._capture.clients[client_id] = session
        silence = asyncio.get_running_loop().call_later(
            SILENCE_TIMEOUT_S, lambda: client_id in self._capture.silent and hang_up(client_id)
        )
        try:
            with ctx.master.addons.get("proxyserver").register_connection(client_id, handler):
                await handler.handle_client()
        finally:
            silence.cancel()
            self._capture.clients.pop(client_id, None)

    def _resolve(self, session: Session, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            query, ancillary, _, peer = sock.recvmsg(4096, 256)
            reply = answer(
                query,
                lambda name: self._capture.provider(name) is not None,
                lambda name: self._capture.egress(session, "refused", "dns", name.rstrip(".").lower()),
            )
            if reply:
                sock.sendmsg([reply], _reply_from(ancillary), 0, peer)


def _reply_from(ancillary: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Answer from the address that was asked (ip(7), IP_PKTINFO; RFC 3542, IPV6_PKTINFO)."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return [(level, kind, struct.pack("=I4s4s", 0, data[8:12], bytes(4)))]
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return [(level, kind, data[:16] + bytes(4))]
    return []


_IP_PKTINFO = 8
