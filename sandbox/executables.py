"""Which host paths a command needs to run: its install prefix, and its interpreter's where it is a script."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from polar_mitm.errors import SetupError
from polar_mitm_sandbox.spec import WORKSPACE

# Shown in every sandbox, so that nothing below them needs a mount of its own.
SYSTEM_DIRS = tuple(
    map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/nix"))
)
_PREFIX_MARKS = ("pyvenv.cfg", "conda-meta", "lib/node_modules", "lib/python3*")


def is_system(path: Path) -> bool:
    return any(path.is_relative_to(root) for root in SYSTEM_DIRS)


@dataclass(frozen=True)
class Executable:
    """A program as the sandbox is to call it, the host paths it needs, and where it finds its interpreter."""

    program: str
    shown: list[Path]
    path: list[str]


def resolve(command: str, search_path: str) -> Executable:
    """Find `command` as a shell would, and say what must be visible for it to start.

    A path relative to the workspace (`./run.sh`) or inside it stays as it is.

    Raises:
        SetupError: there is no such program.
    """
    if command.startswith(("./", "../")) or Path(command).is_relative_to(WORKSPACE):
        return Executable(command, [], [])
    program = _which(command, search_path)
    if program is None:
        raise SetupError(f"no program called {command!r} on this machine: install it, or give its whole path")
    foreign = [each for each in _involved(program, search_path) if not is_system(each)]
    shown = dict.fromkeys(path for each in foreign for path in _install(each))
    return Executable(str(program), list(shown), list(dict.fromkeys(str(each.parent) for each in foreign)))


def _which(command: str, search_path: str) -> Path | None:
    """The program that a shell would run. Shims of version managers (pyenv, asdf) are left out: they need all
    of their manager, and what they would start is on the path behind them or has a path of its own."""
    real = ":".join(each for each in search_path.split(":") if Path(each).name != "shims")
    found = shutil.which(command, path=real)
    return Path(found).absolute() if found else None


def _involved(program: Path, search_path: str) -> list[Path]:
    """`program`, what it links to, and what runs it, down to a real binary."""
    real = program.resolve()
    involved = list(dict.fromkeys((program, real)))
    runner = _interpreter(real, search_path) or _venv_home(program)
    return involved if runner is None else involved + _involved(runner, search_path)


def _install(program: Path) -> list[Path]:
    """The smallest directory that holds a whole installation, or just the file.

    `~/.local` and the home directory are prefixes too, but hold far more than one program.
    """
    modules = next((p for p in reversed(program.parents) if p.name == "node_modules"), None)
    if modules is not None:
        return [modules]
    prefix = program.parent.parent
    if program.parent.name == "bin" and any(any(prefix.glob(mark)) for mark in _PREFIX_MARKS):
        if prefix in (Path.home(), Path.home() / ".local"):
            return [program, *prefix.glob("lib/python3*")]
        return [prefix]
    return [program]


def _interpreter(script: Path, search_path: str) -> Path | None:
    """What the kernel runs `script` with; through `env` where it says so."""
    try:
        with script.open("rb") as file:
            first = file.readline(512)
    except PermissionError:  # a program that may be run but not read is no script
        return None
    if not first.startswith(b"#!"):
        return None
    words = first[2:].decode("utf-8", "replace").split()
    if words and Path(words[0]).name == "env":
        names = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        return _which(names[0], search_path) if names else None
    return Path(words[0]) if words and Path(words[0]).exists() else None


def _venv_home(program: Path) -> Path | None:
    """The interpreter under a virtual environment's `bin/python`, whose libraries it uses."""
    config = program.parent.parent / "pyvenv.cfg"
    if program.parent.name != "bin" or not config.is_file():
        return None
    for line in config.read_text().splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "home":
            base = Path(value.strip()) / "python3"
            return base if base.exists() else None
    return None
