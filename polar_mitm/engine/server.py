"""One managed vLLM server: started as a daemon, found again by its state file, stopped with its workers."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import msgspec

from polar_mitm.cache import default_cache
from polar_mitm.engine import flags, state
from polar_mitm.engine.build import OnStep, locked, tail
from polar_mitm.engine.env import device, ensure_env
from polar_mitm.engine.flags import Launch
from polar_mitm.engine.model import DEFAULT_MODEL, ensure_model
from polar_mitm.engine.state import EngineState
from polar_mitm.errors import EngineUnfit, SetupError

_COMPLAINT = re.compile(r"((?:\w+\.)*\w*(?:Error|Exception)|error): (?!Engine core init).+")
# Straight to the server: a proxy of the environment has no business with 127.0.0.1.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def up(
    model: str | None = None,
    *,
    cache: Path | None = None,
    dtype: str | None = None,
    max_model_len: int | None = None,
    tool_call_parser: str = "hermes",
    dev: bool = False,
    lora: int = 0,
    transfer: bool = False,
    port: int | None = None,
    extra: Sequence[str] = (),
    timeout_s: float = 900.0,
    on_step: OnStep = lambda step: None,
) -> EngineState:
    """A running engine: the one that runs already, or a new one, installed first if need be.

    Args:
        model: a Hugging Face folder or name; None for the default model, or for whichever runs.
        cache: where everything is kept; `default_cache()` by default.
        dtype, max_model_len: of the model; see `flags.completed` for what is chosen.
        tool_call_parser: vLLM's parser for the tool calls that this model writes.
        dev: open the endpoints that change weights (VLLM_SERVER_DEV_MODE).
        lora: the largest rank of LoRA adapters to be loaded, at most 512; implies `dev`.
        transfer: take weights out of a trainer's GPU memory; implies `dev`. Whoever can reach the port can
            then run code as this user.
        port: on 127.0.0.1; any free one by default.
        extra: more arguments for vLLM.
        timeout_s: for the server's start, a model's download included; not for the installation.

    Raises:
        SetupError: it cannot be installed, or an engine runs that serves something else.
        EngineUnfit: the server stopped while it started, or did not answer in time.
    """
    if lora > flags.LORA_RANKS[-1]:
        raise SetupError(f"vLLM takes LoRA adapters of rank {flags.LORA_RANKS[-1]} at most, not {lora}")
    if transfer and device() != "cuda":
        raise SetupError("weights are taken from GPU memory only, and there is no GPU: update from a folder")
    dev = dev or transfer or lora > 0
    cache = (cache or default_cache()).absolute()
    path = _state_path(cache)
    with locked(cache / "engine" / ".up.lock", lambda: on_step("Waiting for another start of the engine")):
        if (running := state.read(path)) is not None:
            if state.alive(running):
                asked = {"dev": dev, "lora": lora, "transfer": transfer}
                return _ready(_compatible(running, model, dtype, asked), path, None, timeout_s)
            state.terminate(running)
        python = ensure_env(cache, on_step)
        folder = ensure_model(cache, model, on_step)
        launch = Launch(
            folder,
            device(),
            port or _free_port(),
            dtype=dtype or "",
            max_model_len=max_model_len,
            tool_call_parser=tool_call_parser,
            dev=dev,
            lora=lora,
            transfer=transfer,
            extra=tuple(extra),
        )
        launch = flags.completed(launch, default=model in (None, DEFAULT_MODEL))
        on_step(f"Starting vLLM with {launch.served_model_name} ({launch.dtype})")
        process, started = _spawn(python, launch, cache / "engine" / "engine.log")
        try:
            state.write(path, started)
            ready = _ready(started, path, process, timeout_s)
        except BaseException:
            state.terminate(started)
            path.unlink(missing_ok=True)
            raise
        on_step(f"vLLM is up at {ready.url} after {time.time() - ready.started_at:.0f} s")
        return ready


def down(cache: Path | None = None) -> EngineState | None:
    """Stop the managed engine, its workers too; returns what was stopped, None if nothing ran.

    Raises:
        SetupError: some process of it does not end.
    """
    path = _state_path((cache or default_cache()).absolute())
    found = state.read(path)
    running = found if found is not None and state.members(found) else None
    if running is not None:
        state.terminate(running)
    path.unlink(missing_ok=True)
    return running


def status(cache: Path | None = None) -> EngineState | None:
    """The managed engine whose process runs, or None. Whether it answers is `healthy`'s matter."""
    found = state.read(_state_path((cache or default_cache()).absolute()))
    return found if found is not None and state.alive(found) else None


def healthy(url: str, timeout_s: float = 5.0) -> bool:
    """Whether the server at `url` says that it can serve."""
    try:
        with _DIRECT.open(f"{url}/health", timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _state_path(cache: Path) -> Path:
    return cache / "engine" / "state.json"


def _compatible(
    running: EngineState, model: str | None, dtype: str | None, asked: dict[str, int]
) -> EngineState:
    """The running engine, unless something else was asked for."""
    names = {running.model, running.served_model_name}
    other = model is not None and not names & {model, str(Path(model).expanduser().resolve())}
    less = any(getattr(running, name) < least for name, least in asked.items())
    if other or less or dtype not in (None, running.dtype):
        can = [name for name in asked if getattr(running, name)]
        what = f"{running.served_model_name} ({', '.join([running.dtype, *can])})"
        raise SetupError(
            f"the engine at {running.url} serves {what}, not what is asked for: "
            "stop it first (polar-mitm engine down)"
        )
    return running


def _spawn(python: Path, launch: Launch, log: Path) -> tuple[subprocess.Popen[bytes], EngineState]:
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    with log.open("wb") as out:
        process = subprocess.Popen(
            flags.command(python, launch),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=flags.environment(python, launch),
            cwd=log.parent,
            start_new_session=True,
        )
    born = state.birth(process.pid)
    # Reaps the server where the caller outlives it; a daemon thread, so the server outlives the caller.
    threading.Thread(target=process.wait, daemon=True).start()
    return process, EngineState(
        url=f"http://127.0.0.1:{launch.port}",
        pid=process.pid,
        birth=born or "",
        model=str(launch.model),
        served_model_name=launch.served_model_name,
        dtype=launch.dtype,
        log=str(log),
        started_at=time.time(),
        dev=launch.dev,
        lora=launch.lora,
        transfer=launch.transfer,
    )


def _ready(
    started: EngineState, path: Path, process: subprocess.Popen[bytes] | None, timeout_s: float
) -> EngineState:
    """Wait until the server answers; then its state, with its window, is complete."""
    log, deadline = Path(started.log), time.monotonic() + timeout_s
    while not healthy(started.url):
        if not state.alive(started):
            killed = process is not None and process.wait() == -signal.SIGKILL
            why = "it was killed: is there enough memory?" if killed else complaint(log)
            raise EngineUnfit(f"vLLM stopped while starting (see {log}): {why}")
        if time.monotonic() > deadline:
            raise EngineUnfit(
                f"vLLM does not answer at {started.url} after {timeout_s:.0f} s (see {log}): {complaint(log)}"
            )
        time.sleep(0.2)
    if started.max_model_len:
        return started
    with _DIRECT.open(f"{started.url}/v1/models", timeout=30) as response:
        served = json.load(response)["data"][0]
    ready = msgspec.structs.replace(started, max_model_len=served["max_model_len"])
    state.write(path, ready)
    return ready


def complaint(log: Path) -> str:
    """What went wrong, in the log's words: its last error without the traceback, else its last lines."""
    text = log.read_text(errors="replace") if log.exists() else ""
    errors = [match[0] for match in _COMPLAINT.finditer(text)]
    return errors[-1] if errors else tail(log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
