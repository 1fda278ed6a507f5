"""Starting the two sides of a benchmark as processes of their own, and reading what CPU they used."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from mitmproxy import certs

from polar_mitm.dialects.ids import new_id
from polar_mitm.types import Rollout

ROOT = Path(__file__).parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Seconds of CPU of a process and its children, those that have ended, too.

    Its own are of its CPU clock (clock_getcpuclockid(3)), which is finer than the ticks of proc(5).
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = time.clock_gettime((~pid << 3) | 2) + sum(map(int, fields[13:15])) / _TICKS  # cutime, cstime
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return own + sum(cpu_s(int(child)) for thread in threads for child in thread.read_text().split())


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@dataclass
class Side:
    """A proxy under test: where to connect, what it is called, which process burns the CPU."""

    name: str
    pid: int
    port: int
    server_name: str
    path: str
    plain: bool = False


@contextlib.asynccontextmanager
async def spawned(
    *command: str, line: bool = True, env: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A child process, with `env` beside our environment, and the first line that it prints."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=asyncio.subprocess.PIPE if line else asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        first = (await process.stdout.readline()).decode().strip() if process.stdout else ""
        yield process, first
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 20)
        except TimeoutError:
            process.kill()


@contextlib.asynccontextmanager
async def fast_engine(
    tokens: int, delay_s: float, prompt_tokens: int, certificate: Path | None = None
) -> AsyncIterator[str]:
    """The raw-asyncio engine of tests/support; yields its URL."""
    command = [sys.executable, "-m", "tests.support.fast_engine", "--tokens", str(tokens)]
    command += ["--chunk-delay", str(delay_s), "--prompt-tokens", str(prompt_tokens)]
    command += ["--certificate", str(certificate)] if certificate else []
    async with spawned(*command) as (_, url):
        yield url


def self_signed(folder: Path) -> Path:
    """A PEM file with a key and its own certificate."""
    key, certificate = certs.create_ca("bench", "localhost", 2048)
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + certificate.public_bytes(Encoding.PEM)
    )
    return path


@contextlib.asynccontextmanager
async def stock_mitmdump(engine_url: str, confdir: Path, *, stream: bool) -> AsyncIterator[Side]:
    """mitmdump with its default addons in front of the engine, TLS towards the client."""
    port = free_port()
    command = [script("mitmdump"), "-q", "--mode", f"reverse:{engine_url}@127.0.0.1:{port}"]
    command += ["--set", f"confdir={confdir}", "--ssl-insecure"]
    if stream:
        addon = confdir / "stream.py"
        addon.write_text("def responseheaders(flow):\n    flow.response.stream = True\n")
        command += ["-s", str(addon)]
    async with spawned(*command, line=False) as (process, _):
        await listening(port)
        path = "/v1/chat/completions"
        name = "stock mitmdump, TLS" if engine_url.startswith("https") else "stock mitmdump"
        yield Side(name, process.pid, port, "localhost", path)


@contextlib.asynccontextmanager
async def interceptor(engine_url: str, folder: Path, num_rollouts: int = 1) -> AsyncIterator[list[Side]]:
    """`polar-mitm up` with a real store; one loopback listener, as a sandbox would pass it, per rollout."""
    from polar_mitm_addons.control import ControlClient

    control = folder / "control.sock"
    command = [script("polar-mitm"), "up", "--store", str(folder / "bench.duckdb"), "--engine", engine_url]
    command += ["--control", str(control), "--json"]
    async with spawned(*command) as (process, ready):
        assert ready, "polar-mitm up did not start"
        sides, clients = [], []
        for _ in range(num_rollouts):
            sock = socket.create_server(("127.0.0.1", 0), backlog=512)
            rollout, client = Rollout(new_id(), harness="bench"), ControlClient(control)
            await asyncio.to_thread(client.open, rollout, [sock])
            clients.append((client, rollout))
            port = sock.getsockname()[1]
            sides.append(Side("polar-mitm", process.pid, port, "api.anthropic.com", "/v1/messages"))
        yield sides
        for client, rollout in clients:
            await asyncio.to_thread(client.close, rollout)


def script(name: str) -> str:
    """An installed console script of this environment."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or name


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


async def listening(port: int, wait_s: float = 30) -> None:
    """Wait until something accepts on a loopback port."""
    for _ in range(int(wait_s * 10)):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")
