"""The interceptor's door for runners: a UNIX socket through which sandboxes' listeners are handed over.

One connection is one rollout. The runner (never a sandbox) is greeted with `{"ok": true, "ca": "<PEM>"}`,
sends `{"op": "open", "rollout": {...}}` with the listening sockets attached (SCM_RIGHTS), and ends with
`{"op": "close", "rollout": {...}}` or by closing the connection, which counts as an interrupted rollout. The
socket file is its owner's alone, the peer's uid is checked too (unix(7), SO_PEERCRED), and no sandbox has it
in its file system.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec

from polar_mitm.types import Rollout
from polar_mitm_addons.capture import Session
from polar_mitm_addons.interceptor import Serving

MAX_MESSAGE = 1 << 18
MAX_SOCKETS = 16
MAX_REFUSED = 200


class Summary(msgspec.Struct):
    """What a runner is told about its rollout."""

    ok: bool = True
    error: str = ""
    ca: str = ""
    num_calls: int = 0
    num_sampled_tokens: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=dict)
    incomplete: str | None = None


class Request(msgspec.Struct):
    op: str
    rollout: Rollout


class Control:
    """Serves runners on `path` until `close`."""

    def __init__(self, interceptor: Serving, path: Path) -> None:
        self._interceptor, self._path = interceptor, path
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Bind the socket.

        Raises:
            OSError: the path cannot be bound, is no socket, or another interceptor answers on it.
        """
        if self._path.exists() and not self._path.is_socket():
            raise FileExistsError(f"{self._path} is in the way")
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), _seqpacket() as sock:
            sock.connect(str(self._path))
            raise OSError(f"another interceptor is serving {self._path}")
        self._path.unlink(missing_ok=True)
        self._socket = _seqpacket()
        mask = os.umask(0o177)
        try:
            self._socket.bind(str(self._path))
        finally:
            os.umask(mask)
        self._socket.listen(128)
        self._socket.setblocking(False)
        self._spawn(self._accept())

    async def close(self) -> None:
        self._path.unlink(missing_ok=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        while True:
            await _readable(self._socket)
            try:
                peer, _ = self._socket.accept()
            except OSError:  # it left again, or there are no descriptors left
                await asyncio.sleep(0.1)
                continue
            peer.setblocking(False)
            self._spawn(self._serve(peer))

    async def _serve(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):  # a runner that has died needs no answer
            if _peer_uid(peer) not in (0, os.getuid()):
                return
            _send(peer, Summary(ca=self._interceptor.ca_pem.decode()))
            sockets: list[socket.socket] = []
            try:
                request, sockets = await _receive(peer)
                session = await self._open(request, sockets)
            except (ValueError, msgspec.MsgspecError, OSError) as error:
                for sock in sockets:
                    sock.close()
                _send(peer, Summary(ok=False, error=str(error)))
                return
            rollout = request.rollout
            rollout.status = "interrupted"  # unless its runner lives to say otherwise
            try:
                _send(peer, Summary())
                rollout = (await _receive(peer))[0].rollout
            except (ValueError, msgspec.MsgspecError, OSError):
                pass
            finally:
                await asyncio.shield(self._interceptor.close_rollout(session, rollout))
            _send(
                peer,
                Summary(
                    num_calls=session.num_calls,
                    num_sampled_tokens=session.num_sampled_tokens,
                    refused=dict(session.refused.most_common(MAX_REFUSED)),
                    incomplete=rollout.incomplete,
                ),
            )

    async def _open(self, request: Request, sockets: list[socket.socket]) -> Session:
        if request.op != "open" or not sockets:
            raise ValueError("a rollout begins with `open` and its listening sockets")
        session = await self._interceptor.open_rollout(request.rollout)
        try:
            await self._interceptor.serve(session, sockets)
        except BaseException:
            request.rollout.status = "failed"
            await self._interceptor.close_rollout(session, request.rollout)
            raise
        return session


class ControlClient:
    """A runner's side of one rollout; its calls block, briefly. `ca_pem` is what the sandbox has to trust."""

    def __init__(self, path: Path) -> None:
        self._socket = _seqpacket()
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self.ca_pem = self._answer().ca.encode()

    def open(self, rollout: Rollout, sockets: list[socket.socket]) -> Summary:
        """Hand over a sandbox's listeners.

        Raises:
            RuntimeError: the interceptor refused; the message is its own.
        """
        body = msgspec.json.encode(Request("open", rollout))
        socket.send_fds(self._socket, [body], [s.fileno() for s in sockets])
        return self._answer()

    def close(self, rollout: Rollout) -> Summary:
        """End the rollout with its outcome."""
        self._socket.send(msgspec.json.encode(Request("close", rollout)))
        with self._socket:
            return self._answer()

    def _answer(self) -> Summary:
        data = self._socket.recv(MAX_MESSAGE)
        if not data:
            raise RuntimeError("the interceptor went away")
        summary = msgspec.json.decode(data, type=Summary)
        if not summary.ok:
            raise RuntimeError(summary.error)
        return summary


def _send(peer: socket.socket, summary: Summary) -> None:
    peer.send(msgspec.json.encode(summary))


def _seqpacket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _peer_uid(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[1])


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, lambda: future.done() or future.set_result(None))
    try:
        await future
    finally:
        loop.remove_reader(sock)


async def _receive(peer: socket.socket) -> tuple[Request, list[socket.socket]]:
    await _readable(peer)
    data, fds, _, _ = socket.recv_fds(peer, MAX_MESSAGE, MAX_SOCKETS)
    sockets = [socket.socket(fileno=fd) for fd in fds]
    if not data:
        raise ValueError("the runner closed the connection")
    try:
        return msgspec.json.decode(data, type=Request), sockets
    except msgspec.MsgspecError:
        for sock in sockets:
            sock.close()
        raise
