"""What is known of the managed engine's server, and whether it still runs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from polar_mitm.errors import SetupError


class EngineState(Struct, frozen=True):
    """A server that `up` started.

    Attributes:
        pid: of the server; it leads a session of its own, in which its workers run.
        birth: boot and clock tick at which that process started: tells it from a later one of its pid.
        model: what was asked for: a folder or a Hugging Face name.
        max_model_len: the window in tokens; 0 until the server answers.
        dev: whether the endpoints that change weights are open (VLLM_SERVER_DEV_MODE).
        lora: the largest rank of LoRA adapters that it takes; 0 for none.
        transfer: whether it takes weights out of a trainer's GPU memory.
        log: path of the server's output.
    """

    url: str
    pid: int
    birth: str
    model: str
    served_model_name: str
    dtype: str
    log: str
    started_at: float
    max_model_len: int = 0
    dev: bool = False
    lora: int = 0
    transfer: bool = False


def read(path: Path) -> EngineState | None:
    """The state in a file; None where there is none or it is broken. Its server may be long gone."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=EngineState)
    except (OSError, msgspec.MsgspecError):
        return None


def write(path: Path, state: EngineState) -> None:
    """Replace the file; only its owner may read it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600, exist_ok=False)
    fresh.write_bytes(msgspec.json.encode(state))
    fresh.replace(path)


def alive(state: EngineState) -> bool:
    """Whether the server's own process, and not a later one of its pid, runs."""
    return birth(state.pid) == state.birth


def birth(pid: int) -> str | None:
    """Boot and clock tick at which a process started; None if it is gone or a zombie (proc(5), stat)."""
    fields = _stat(pid)
    return f"{_boot()}:{fields[19]}" if fields else None


def members(state: EngineState) -> list[int]:
    """The living processes of the server's session: itself and its workers, who may outlive it.

    A session's number is not given to a new process while one of its members lives; only a live process of
    that pid and another birth, or another boot, says that these are not ours.
    """
    if birth(state.pid) not in (state.birth, None) or not state.birth.startswith(_boot()):
        return []
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if (fields := _stat(pid)) and int(fields[3]) == state.pid]


def terminate(state: EngineState, patience_s: float = 15.0) -> None:
    """End the server and its workers: by request first, then by force. Does nothing where none is left.

    Raises:
        SetupError: something of it survives, which names it.
    """
    if alive(state):
        _signal([state.pid], signal.SIGTERM)
    else:
        patience_s = 0
    if not _ended(state, patience_s):
        _signal(members(state), signal.SIGKILL)
        if not _ended(state, 10.0):
            raise SetupError(f"processes of the engine do not end: {members(state)}")


def _ended(state: EngineState, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while members(state):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the command: state, ppid, pgrp, session, ...; None if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
