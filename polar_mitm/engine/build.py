"""Building things in the cache exactly once: locks, markers for what is whole, and commands with a log."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from polar_mitm.errors import SetupError

OnStep = Callable[[str], None]

_MARKER = ".complete"
_PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # the locks were made for these, and tried with the first
_HAS_VENV = (
    "import ensurepip, platform, venv; print(platform.python_implementation(), platform.python_version())"
)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the file lock at `path` (flock: freed with the process, however it ends)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_built(folder: Path, fingerprint: str, holds: str) -> bool:
    """Whether `folder` was built to its end of what `fingerprint` stands for; `holds` is in it."""
    try:
        return (folder / _MARKER).read_text() == fingerprint and (folder / holds).exists()
    except OSError:
        return False


def build_once(
    folder: Path,
    fingerprint: str,
    holds: str,
    build: Callable[[Path], None],
    on_step: OnStep,
    gigabytes: float,
) -> Path:
    """`folder`, built by `build(folder)` unless `is_built`.

    It is built in its place, because a virtual environment cannot be moved; the marker comes last, and a
    folder without it is removed first. Two processes do not build at once: the second waits.

    Raises:
        SetupError: `build` failed, or there are fewer than `gigabytes` free.
    """

    def waiting() -> None:
        on_step(f"Waiting for another process that builds {folder.name}")

    if is_built(folder, fingerprint, holds):  # by somebody whose cache we may only read, maybe
        return folder
    with locked(folder.with_name(f".{folder.name}.lock"), waiting):
        if is_built(folder, fingerprint, holds):
            return folder
        if folder.exists():
            on_step(f"Removing {folder}, which is not whole or of another version")
            shutil.rmtree(folder)
        free = shutil.disk_usage(folder.parent).free / 1e9
        if free < gigabytes:
            raise SetupError(
                f"{folder.parent} has {free:.1f} GB free, and {folder.name} needs {gigabytes:g}: "
                "make room, or set POLAR_MITM_CACHE to a directory on another disk"
            )
        folder.mkdir()
        build(folder)
        (folder / _MARKER).write_text(fingerprint)
    return folder


def run(command: Sequence[str | Path], what: str, log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a command to its end, its output in `log`.

    Raises:
        SetupError: it cannot be started or fails; the message ends with the last lines of the log.
    """
    with log.open("ab") as out:
        try:
            done = subprocess.run(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=clean_environment() if env is None else env,
            )
        except OSError as error:
            raise SetupError(f"{what} failed: {error}") from error
    if done.returncode != 0:
        raise SetupError(f"{what} failed ({log}):\n{tail(log)}")


def make_environment(folder: Path, log: Path) -> Path:
    """The Python of a fresh virtual environment at `folder`, made by the interpreter that suits best."""
    run([find_python(), "-m", "venv", "--clear", folder], "making a virtual environment", log)
    return folder / "bin" / "python"


def pip_install(python: Path, *arguments: str | Path, log: Path) -> None:
    """`pip install` of exactly what is named: no dependencies, nothing built from source."""
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--no-input",
        "--no-deps",
        "--only-binary",
        ":all:",
        *arguments,
    ]
    run(command, f"pip install {' '.join(map(str, arguments))} (is there a network?)", log)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead another Python or its pip astray."""
    stray = {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV"}
    return {name: value for name, value in os.environ.items() if name not in stray}


def find_python() -> str:
    """An interpreter that can make virtual environments, 3.11 first: on PATH, of pyenv or uv, or this one.

    Raises:
        SetupError: there is none.
    """
    home = Path.home()
    pyenv = Path(os.environ.get("PYENV_ROOT") or home / ".pyenv") / "versions"
    uv = home / ".local" / "share" / "uv" / "python"
    for version in _PYTHONS:
        found = [shutil.which(f"python{version}"), f"/usr/bin/python{version}"]
        if sys.version_info[:2] == tuple(map(int, version.split("."))):
            found.append(sys.executable)
        found += sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))
        found += sorted(map(str, uv.glob(f"cpython-{version}.*/bin/python")))
        for python in found:
            if python and _makes_environments(python, version):
                return python
    raise SetupError(
        f"no CPython {' or '.join(_PYTHONS)} with venv and pip found: install one "
        "(Debian, Ubuntu: apt-get install python3-venv)"
    )


def _makes_environments(python: str, version: str) -> bool:
    try:
        done = subprocess.run(
            [python, "-c", _HAS_VENV], capture_output=True, text=True, timeout=30, env=clean_environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.startswith(f"CPython {version}.")


def check_platform(what: str) -> None:
    """Raise SetupError unless this is Linux on x86_64 or aarch64."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SetupError(
            f"{what} runs on Linux (x86_64, aarch64), not on {platform.system()} {platform.machine()}: "
            "start a vLLM on a machine of your own and name it with --engine URL"
        )
