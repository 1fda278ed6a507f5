"""How a run ends, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path

import pytest

from polar_mitm.errors import SetupError
from polar_mitm_sandbox import NamespaceSandbox, SandboxSpec
from tests.sandbox.users import User


def alive(mark: str) -> dict[int, str]:
    """Command lines of this machine's processes that hold `mark`, except our own, by process id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line and int(process.name) != os.getpid():
            found[int(process.name)] = line
    return found


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 1", 1), ("exit 42", 42), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
def test_exit_code(user: User, script: str, code: int) -> None:
    assert user.shell(script).exit_code == code


def test_output_and_input(user: User) -> None:
    out = user.shell("echo to out; echo to err >&2; cat; readlink /proc/self/fd/0")
    assert (out.stdout, out.stderr) == ("to out\n/dev/null\n", "to err\n")


def test_timeout_kills_everything(user: User) -> None:
    mark = uuid.uuid4().hex
    out = user.shell(f"trap '' TERM INT; (setsid sleep 1000 {mark} &) ; sleep 999 # {mark}", timeout_s=1.0)
    assert (out.timed_out, out.exit_code) == (True, 137)
    assert alive(mark) == {}


def test_stop_kills_everything(user: User) -> None:
    mark = uuid.uuid4().hex
    script = f"setsid bash -c 'sleep 1000 # {mark}' & setsid bash -c 'touch up; sleep 1000 # {mark}'"
    out = user.shell(script, stop_when="up")
    assert (out.timed_out, out.exit_code) == (False, 137)
    assert alive(mark) == {}


def test_what_the_harness_leaves_running_dies_with_it(user: User) -> None:
    mark = uuid.uuid4().hex
    out = user.shell(f"setsid bash -c 'sleep 1000 # {mark}' & exit 7")
    assert out.exit_code == 7
    assert alive(mark) == {}


def test_nothing_outlives_a_killed_runner(user: User) -> None:
    mark = uuid.uuid4().hex
    with user.directory() as workdir:
        script = f"trap '' TERM; echo $$ > up; (sleep 1000; echo {mark})"
        run = {"ca_pem": user.ca_pem, "command": ["bash", "-c", script], "workdir": str(workdir)}
        driver = user.driver(arguments=[runner := uuid.uuid4().hex])
        assert driver.stdin is not None
        driver.stdin.write(json.dumps([run]))
        driver.stdin.close()
        while not (workdir / "up").exists():
            time.sleep(0.02)
        assert alive(mark)
        for process, line in alive(runner).items():
            if line.startswith(sys.executable):
                os.kill(process, signal.SIGKILL)
        driver.wait()
        while alive(mark):  # the kernel kills it, in its own time; pytest's timeout is the bound
            time.sleep(0.02)
        # Root's next run gets a workspace back that a killed one had borrowed.
        out = user.shell("touch up && stat -c %U up", workdir=workdir)
        assert (out.exit_code, out.stdout) == (0, "agent\n"), out
        assert (workdir / "up").stat().st_uid == user.uid


def test_a_fork_bomb_is_bounded(user: User) -> None:
    code = """
import os, json, sys, time
made = 0
try:
    while made < 500:
        if os.fork() == 0: time.sleep(60); os._exit(0)
        made += 1
except BlockingIOError: pass
print(made)
"""
    assert 0 < user.python(code, limits={"num_processes": 100}).json() < 100


def test_file_size_and_core_are_bounded(user: User) -> None:
    script = "ulimit -c; head -c 2000000 /dev/zero > big; stat -c %s big"
    out = user.shell(script, limits={"file_bytes": 1_000_000})
    assert out.stdout.split() == ["0", "1000000"], out


def test_scratch_space_is_bounded(user: User) -> None:
    script = "for d in /tmp ~ /dev/shm; do head -c 3000000 /dev/zero > $d/big; stat -c %s $d/big; done"
    out = user.shell(script, limits={"scratch_bytes": 1 << 20})
    assert out.stdout.split() == [str(1 << 20)] * 3, out


@pytest.fixture
def ca(certificates: tuple[str, Path]) -> bytes:
    return certificates[0].encode()


async def test_when_nobody_takes_the_listeners_nothing_is_left(ca: bytes, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex

    async def refuse(listeners: list[socket.socket]) -> None:
        for listener in listeners:
            listener.close()
        raise ValueError("no")

    spec = SandboxSpec(["bash", "-c", f"sleep 1000 # {mark}"], tmp_path, ca)
    with pytest.raises(ValueError, match="no"):
        await NamespaceSandbox().start(spec, refuse)
    assert alive(mark) == {}
    assert os.stat(tmp_path).st_uid == os.geteuid()  # noqa: PTH116


async def test_the_command_starts_only_when_somebody_accepts(ca: bytes, tmp_path: Path) -> None:
    seen = []

    async def take(listeners: list[socket.socket]) -> None:
        seen.extend([(each.type, each.getsockname()[1], each.getblocking()) for each in listeners])
        assert os.listdir(tmp_path) == []  # noqa: PTH208
        for listener in listeners:
            listener.close()

    sandbox = NamespaceSandbox()
    await sandbox.start(SandboxSpec(["touch", "started"], tmp_path, ca), take)
    assert await sandbox.wait() == 0
    assert (tmp_path / "started").exists()
    tcp, udp = socket.SOCK_STREAM, socket.SOCK_DGRAM
    assert seen[:3] == [(tcp, 443, False), (tcp, 80, False), (udp, 53, False)]
    await sandbox.stop()  # again: harmless
    assert await sandbox.wait() == 0


async def test_descriptors_do_not_leak(ca: bytes, tmp_path: Path) -> None:
    async def take(listeners: list[socket.socket]) -> None:
        for listener in listeners:
            listener.close()

    async def once() -> None:
        sandbox = NamespaceSandbox()
        await sandbox.start(SandboxSpec(["true"], tmp_path, ca), take)
        assert await sandbox.wait() == 0

    await once()
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    for _ in range(5):
        await once()
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


async def test_wait_before_start() -> None:
    with pytest.raises(RuntimeError):
        await NamespaceSandbox().wait()


async def test_bubblewrap_missing(ca: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))

    async def never(listeners: list[socket.socket]) -> None:
        raise AssertionError("not reached")

    with pytest.raises(SetupError, match="bubblewrap"):
        await NamespaceSandbox().start(SandboxSpec(["true"], tmp_path, ca), never)
