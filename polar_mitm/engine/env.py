"""An environment of its own for vLLM: its pins and mitmproxy's cannot be met together."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from polar_mitm.engine.build import (
    OnStep,
    build_once,
    check_platform,
    is_built,
    make_environment,
    pip_install,
    run,
    tail,
)
from polar_mitm.errors import SetupError

VLLM_VERSION = "0.32.0"
Device = Literal["cpu", "cuda"]

# PyTorch's CPU builds (`torch==...+cpu`) are not on PyPI: pytorch.org/get-started/locally.
_TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_SIZE_GB: dict[Device, float] = {"cpu": 4, "cuda": 20}
_PYTHON = "bin/python"
_CHECK = "from vllm.platforms import current_platform as p; assert p.device_type == {device!r}, p.device_type"


def device() -> Device:
    """ "cuda" where nvidia-smi lists a GPU, else "cpu"."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "cpu"
    try:
        listing = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listing.returncode == 0 and "GPU" in listing.stdout else "cpu"


def ensure_env(cache: Path, on_step: OnStep) -> Path:
    """The Python of an environment that holds vLLM for this machine, installed if need be.

    Raises:
        SetupError: unsupported platform, no room, no Python, or no network; the message says what to do.
    """
    check_platform("the managed engine")
    kind = device()
    requirements, fingerprint, folder = _plan(cache, kind)
    python = folder / _PYTHON

    def build(folder: Path) -> None:
        size, minutes = ("2.5", "1 to 3") if kind == "cpu" else ("12", "5 to 10")
        name = "CPU" if kind == "cpu" else "NVIDIA GPUs"
        on_step(f"Installing vLLM {VLLM_VERSION} for {name} ({size} GB, {minutes} minutes) into {folder}")
        log = folder.with_name("install.log")
        log.write_text("")
        make_environment(folder, log)
        if kind == "cpu":
            _install_torch_cpu(python, requirements, log)
        pip_install(python, "-r", requirements, log=log)
        run([python, "-c", _CHECK.format(device=kind)], f"importing vLLM {VLLM_VERSION}", log)
        on_step(f"vLLM {VLLM_VERSION} is installed")

    build_once(folder, fingerprint, _PYTHON, build, on_step, _SIZE_GB[kind])
    return python


def is_installed(cache: Path) -> bool:
    """Whether `ensure_env` would find all that it needs."""
    _, fingerprint, folder = _plan(cache, device())
    return is_built(folder, fingerprint, _PYTHON)


def _plan(cache: Path, kind: Device) -> tuple[Path, str, Path]:
    """The locked list, what it stands for, and where it is installed."""
    requirements = Path(__file__).with_name(f"requirements-{kind}.txt")
    fingerprint = hashlib.sha256(requirements.read_bytes()).hexdigest()
    return requirements, fingerprint, cache.absolute() / "engine" / f"vllm-{VLLM_VERSION}-{kind}"


def _install_torch_cpu(python: Path, requirements: Path, log: Path) -> None:
    """Torch's CPU build from where pip is told to look; if it is not there, from PyTorch's own index."""
    torch = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
    try:
        pip_install(python, torch, log=log)
    except SetupError:
        if "No matching distribution found" not in tail(log):
            raise
        pip_install(python, "--extra-index-url", _TORCH_CPU_INDEX, torch, log=log)
