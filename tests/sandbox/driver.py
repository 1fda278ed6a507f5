"""Runs sandboxes as whoever executes this script, behind a small server, and reports what came of them.

A process of its own, because tests want it as root, as an ordinary user, and killed. Reads a list of runs as
JSON from standard input (see `one`), prints a list of outcomes.

The server answers on the sandbox's listeners: HTTP with "WHO ADDRESS PORT" (who asked, and whom it meant to
reach), TLS with the certificate that the run gives, DNS with one address for every name.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import struct
import sys
from pathlib import Path
from typing import Any

from polar_mitm.errors import SetupError
from polar_mitm_sandbox import Limits, NamespaceSandbox, SandboxSpec

ANSWERED_ADDRESS = "198.51.100.7"
IPV6_PKTINFO = 50


class Server:
    """Accepts on one sandbox's listeners. `replies` are bodies for POST requests, in order."""

    def __init__(self, who: str, certificate: str | None, replies: list[str]) -> None:
        self.who, self.replies, self.posts = who, replies, []
        self.tls = None
        if certificate is not None:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.tls.load_cert_chain(certificate)
        self.tasks: set[asyncio.Task[None]] = set()
        self.listeners: list[socket.socket] = []

    async def serve(self, listeners: list[socket.socket]) -> None:
        self.listeners = listeners
        for listener in listeners:
            if listener.type == socket.SOCK_STREAM:
                self.spawn(self.accept(listener))
            else:
                asyncio.get_running_loop().add_reader(listener, self.answer_name, listener)

    def spawn(self, work: Any) -> None:
        self.tasks.add(task := asyncio.ensure_future(work))
        task.add_done_callback(self.tasks.discard)

    async def accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            self.spawn(self.connected(connection))

    async def connected(self, connection: socket.socket) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(connection, ready.set)
        await ready.wait()
        loop.remove_reader(connection)
        tls = self.tls if connection.recv(1, socket.MSG_PEEK) == b"\x16" else None
        address, port = connection.getsockname()[:2]
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=tls)
        while (body := await self.request(reader)) is not None:
            kind, text = "text/plain", f"{self.who} {address} {port}"
            if body:
                self.posts.append(body.decode())
                kind, text = "text/event-stream", self.replies.pop(0)
            head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\n\r\n"
            transport.write(f"{head}{text}".encode())
        transport.close()

    async def request(self, reader: asyncio.StreamReader) -> bytes | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        length = next(
            (line[15:] for line in head.split(b"\r\n") if line.startswith(b"content-length:")), b"0"
        )
        return await reader.readexactly(int(length))

    def answer_name(self, listener: socket.socket) -> None:
        query, ancillary, _, asker = listener.recvmsg(4096, 256)
        end = query.index(b"\0", 12) + 5
        (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
        record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + socket.inet_aton(ANSWERED_ADDRESS)
        answers = [record] if kind == 1 else []
        reply = (
            query[:2]
            + struct.pack(">HHHHH", 0x8180, 1, len(answers), 0, 0)
            + query[12:end]
            + b"".join(answers)
        )
        source = []
        for level, what, data in ancillary:  # answer from the address that was asked: in_pktinfo, in6_pktinfo
            if level == socket.SOL_IP:
                source.append((level, what, struct.pack("=I4s4s", 0, data[8:12], bytes(4))))
            elif what == IPV6_PKTINFO:
                source.append((level, what, data[:16] + struct.pack("=I", 0)))
        listener.sendmsg([reply], source, 0, asker)

    def close(self) -> None:
        for listener in self.listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        for task in self.tasks:
            task.cancel()


async def one(run: dict[str, Any]) -> dict[str, Any]:
    """`run`: fields of SandboxSpec, and `who`, `certificate`, `replies`, `stop_when` (a file appears)."""
    server = Server(run.pop("who", "?"), run.pop("certificate", None), run.pop("replies", []))
    stop_when = run.pop("stop_when", None)
    spec = SandboxSpec(
        command=run.pop("command"),
        workdir=Path(run.pop("workdir")),
        ca_pem=run.pop("ca_pem").encode(),
        limits=Limits(**run.pop("limits", {})),
        read_only=[Path(path) for path in run.pop("read_only", [])],
        never_visible=[Path(path) for path in run.pop("never_visible", [])],
        stdout=os.memfd_create("stdout"),
        stderr=os.memfd_create("stderr"),
        **run,
    )
    sandbox, outcome = NamespaceSandbox(), {}
    try:
        await sandbox.start(spec, server.serve)
        if stop_when is not None:
            while not (spec.workdir / stop_when).exists():  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.01)
            await sandbox.stop()
        outcome["exit_code"] = await sandbox.wait()
    except SetupError as error:
        outcome["setup_error"] = str(error)
    for name, fd in (("stdout", spec.stdout), ("stderr", spec.stderr)):
        outcome[name] = os.pread(fd, 1 << 20, 0).decode(errors="replace")
    server.close()
    return outcome | {"timed_out": sandbox.timed_out, "posts": server.posts}


async def main() -> None:
    runs = json.load(sys.stdin)
    print(json.dumps(await asyncio.gather(*map(one, runs))))


if __name__ == "__main__":
    asyncio.run(main())
