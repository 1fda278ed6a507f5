"""A load client that costs little: raw asyncio, TLS, keep-alive, chunked answers."""

from __future__ import annotations

import asyncio
import re
import ssl
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.bench.processes import Side, cpu_s


@dataclass
class Load:
    """What a client saw: seconds to the first body byte, to the first token and to the end, per call."""

    first_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def cpu_ms_per_call(self) -> float:
        return self.cpu_s / len(self.total_s) * 1000

    @property
    def first_byte_ms(self) -> float:
        """The median."""
        return statistics.median(self.first_s) * 1000

    @property
    def first_token_ms(self) -> float:
        """The median."""
        return statistics.median(self.token_s) * 1000


def request_bytes(side: Side, body: bytes) -> bytes:
    head = (
        f"POST {side.path} HTTP/1.1\r\nhost: {side.server_name}\r\ncontent-type: application/json\r\n"
        f"x-api-key: sk-bench-0123456789\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def tls() -> ssl.SSLContext:
    """Trusts anything: the interceptor's certificate is not what is measured."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def call_repeatedly(side: Side, body: bytes, num_calls: int, load: Load) -> bytes:
    """`num_calls` calls on one connection, one after another; the last answer.

    Raises:
        RuntimeError: an answer is an error, or has not the first token of the fast engine.
    """
    encryption = None if side.plain else tls()
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", side.port, ssl=encryption, server_hostname=side.server_name if encryption else None
    )
    data, answer = request_bytes(side, body), b""
    for _ in range(num_calls):
        start = time.perf_counter()
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{side.name}: {head[:200]!r} {(await reader.read(1000))!r}")
        first = token = 0.0
        parts, tail = [], b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            first = first or time.perf_counter()
            part = (await reader.readexactly(size + 2))[:-2]
            if not token and b"tok0" in tail + part:
                token = time.perf_counter()
            parts.append(part)
            tail = part[-3:]
        await reader.readexactly(2)
        answer = b"".join(parts)
        if not token:
            raise RuntimeError(f"{side.name}: no token in {answer[:1000]!r}")
        load.first_s.append(first - start)
        load.token_s.append(token - start)
        load.total_s.append(time.perf_counter() - start)
    writer.close()
    return answer


async def alternate(
    sides: list[tuple[Side, bytes]], *, tokens: int, rounds: int, calls: int, clients: int
) -> dict[str, Load]:
    """`rounds` times `calls` calls by each of `clients`, by turns to each side: name -> what it took.

    What else the machine does falls on all sides. Before the first round each side answers some calls that do
    not count (certificates, caches, the adaptive interpreter), and the answer is looked at: it must have
    everything that the engine said.

    Raises:
        RuntimeError: an answer is an error, or lacks some of the `tokens` of the fast engine.
    """
    loads = {side.name: Load() for side, _ in sides}
    for side, body in sides:
        said = {int(n) for n in re.findall(rb"tok(\d+)", await call_repeatedly(side, body, 10, Load()))}
        if missing := set(range(tokens - 1)) - said:  # the last one ends the answer and has no text
            raise RuntimeError(f"{side.name}: lacks tokens {sorted(missing)}")
    for _ in range(rounds):
        for side, body in sides:
            load = loads[side.name]
            before = cpu_s(side.pid)
            await asyncio.gather(*(call_repeatedly(side, body, calls, load) for _ in range(clients)))
            load.cpu_s += cpu_s(side.pid) - before
    return loads


def print_table(rows: Mapping[str, Mapping[str, object]]) -> None:
    """Rows of figures under the names of their columns."""
    columns = list(next(iter(rows.values())))
    lines = [["", *columns], *([name, *(str(row[c]) for c in columns)] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for name, *figures in lines:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]))
