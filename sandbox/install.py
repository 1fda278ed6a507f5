"""Installs harnesses at pinned versions into a cache, once, and says what a sandbox has to show of them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polar_mitm.errors import SetupError
from polar_mitm_sandbox.recipes import Recipe

OnStep = Callable[[str], None]
_MARKER = "polar-mitm.json"
_INSTALL_TIMEOUT_S = 1800


@dataclass(frozen=True)
class InstalledHarness:
    """A harness on this machine.

    Attributes:
        command: the program, and the script it runs where it is an interpreter; `Recipe.arguments` follow.
        prefix: the directory of the whole installation, `size_bytes` large.
        ro_paths: what the sandbox has to show, for `SandboxSpec.read_only`.
        path: directories for `SandboxSpec.path`.
    """

    name: str
    version: str
    command: tuple[str, ...]
    prefix: Path
    ro_paths: tuple[Path, ...]
    path: tuple[str, ...]
    size_bytes: int

    @property
    def bin_path(self) -> Path:
        return Path(self.command[0])


def default_cache() -> Path:
    """$POLAR_MITM_CACHE, or polar-mitm below $XDG_CACHE_HOME, or below ~/.cache."""
    if given := os.environ.get("POLAR_MITM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polar-mitm"


def ensure_harness(recipe: Recipe, cache: Path, on_step: OnStep = lambda step: None) -> InstalledHarness:
    """The harness, installed if need be. Needs no network when it is in the cache.

    An installation is made beside its place and then renamed, so that a broken one is never taken for whole;
    two processes do not install at once.

    Raises:
        SetupError: npm, pip or the network is missing, or the package is not what the recipe says.
    """
    if not is_installed(recipe, cache):
        prefix = _prefix(recipe, cache)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with _locked(prefix.with_name(f".{prefix.name}.lock")):
            if not is_installed(recipe, cache):
                on_step(f"install {recipe.title} {recipe.version} ({_package(recipe)}) into {prefix}")
                _install(recipe, prefix, cache, on_step)
    return _installed(recipe, _prefix(recipe, cache), cache, on_step)


def is_installed(recipe: Recipe, cache: Path) -> bool:
    """Whether the cache holds the whole of it; a virtual environment may have lost its Python since."""
    prefix = _prefix(recipe, cache)
    wanted = {"package": _package(recipe), "version": recipe.version}
    return wanted.items() <= _marker(prefix).items() and any(prefix.glob(recipe.install.binary))


def _prefix(recipe: Recipe, cache: Path) -> Path:
    return cache.absolute() / "harness" / f"{recipe.name}-{recipe.version}"


def _package(recipe: Recipe) -> str:
    return recipe.install.npm or recipe.install.pip or ""


def _install(recipe: Recipe, prefix: Path, cache: Path, on_step: OnStep) -> None:
    fresh = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.", dir=prefix.parent))
    try:
        fresh.chmod(0o755)
        (_install_npm if recipe.install.npm else _install_pip)(recipe, fresh, cache, on_step)
        for pattern in (recipe.install.binary, *recipe.install.show, *recipe.install.path):
            _one(fresh, pattern, recipe)
        size = sum(
            path.lstat().st_size for path in fresh.rglob("*") if path.is_file() and not path.is_symlink()
        )
        marker = {"package": _package(recipe), "version": recipe.version, "size_bytes": size}
        (fresh / _MARKER).write_text(json.dumps(marker))
        shutil.rmtree(prefix, ignore_errors=True)
        fresh.rename(prefix)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    on_step(f"{recipe.title} {recipe.version}: {size / 1e6:.0f} MB")


def _install_npm(recipe: Recipe, prefix: Path, cache: Path, on_step: OnStep) -> None:
    node = _node(recipe, cache, on_step)
    search = os.pathsep.join([*([str(node)] if node else []), os.environ.get("PATH", os.defpath)])
    npm = shutil.which("npm", path=search)
    if npm is None:
        raise SetupError(
            "npm is missing: install node 22 or newer (apt-get install npm, or https://nodejs.org)"
        )
    _run(
        # A package's own install scripts would run here, outside any sandbox; no recipe needs them.
        [
            npm,
            "install",
            "--prefix",
            str(prefix),
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--loglevel=error",
        ],
        f"{recipe.install.npm}@{recipe.version}",
        {"PATH": search},
    )


def _install_pip(recipe: Recipe, prefix: Path, cache: Path, on_step: OnStep) -> None:
    _run([sys.executable, "-m", "venv"], str(prefix), {})
    pip = [str(prefix / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(pip, f"{recipe.install.pip}=={recipe.version}", {})


def _run(command: list[str], what: str, env: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            [*command, what],
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            umask=0o022,  # the harness runs as another user when root runs it
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"{command[0]} took over {_INSTALL_TIMEOUT_S} s to install {what}") from None
    if done.returncode:
        raise SetupError(
            f"`{' '.join(command)} {what}` failed with exit code {done.returncode}; is there a network and a "
            f"package registry?\n{done.stdout[-2000:].strip()}"
        )


def _installed(recipe: Recipe, prefix: Path, cache: Path, on_step: OnStep) -> InstalledHarness:
    install = recipe.install
    shown = [_one(prefix, pattern, recipe) for pattern in install.show]
    path = [str(_one(prefix, pattern, recipe)) for pattern in install.path]
    command = [str(_one(prefix, install.binary, recipe))]
    if install.script is not None:
        shown.append(install.script)
        command.append(str(install.script))
    if (node := _node(recipe, cache, on_step)) is not None:
        shown.append(node.parent)
        path.append(str(node))
    size = int(_marker(prefix)["size_bytes"])
    return InstalledHarness(
        recipe.name, recipe.version, tuple(command), prefix, tuple(shown), tuple(path), size
    )


def _node(recipe: Recipe, cache: Path, on_step: OnStep) -> Path | None:
    """The directory of a node that is new enough, for a harness that needs one."""
    if recipe.install.node is None:
        return None
    from polar_mitm.engine.node import ensure_node

    return ensure_node(cache, on_step)


def _one(prefix: Path, pattern: str, recipe: Recipe) -> Path:
    if not pattern:
        return prefix
    found = sorted(prefix.glob(pattern))
    if len(found) != 1:
        raise SetupError(
            f"{recipe.title} {recipe.version}: {len(found)} files match {pattern} in its package, not one; "
            "does it exist for this machine?"
        )
    return found[0]


def _marker(prefix: Path) -> dict[str, Any]:
    file = prefix / _MARKER
    return json.loads(file.read_text()) if file.is_file() else {}


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
