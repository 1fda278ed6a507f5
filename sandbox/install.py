"""Installs harnesses at pinned versions into the cache, once, and says what a sandbox has to show of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from polar_mitm.engine.build import OnStep, build_once, is_built, make_environment, run
from polar_mitm.engine.node import ensure_node, with_path
from polar_mitm.errors import SetupError
from polar_mitm_sandbox.recipes import Recipe

_GIGABYTES = 1.0  # free space below which an installation is not begun


@dataclass(frozen=True)
class InstalledHarness:
    """A harness on this machine.

    Attributes:
        command: the program, and the script it runs where it is an interpreter; `Recipe.arguments` follow.
        prefix: the directory of the whole installation.
        ro_paths: what the sandbox has to show, for `SandboxSpec.read_only`.
        path: directories for `SandboxSpec.path`.
    """

    name: str
    version: str
    command: tuple[str, ...]
    prefix: Path
    ro_paths: tuple[Path, ...]
    path: tuple[str, ...]

    @property
    def bin_path(self) -> Path:
        return Path(self.command[0])

    @property
    def size_bytes(self) -> int:
        """Of the whole installation on disk."""
        return sum(path.lstat().st_size for path in self.prefix.rglob("*"))


def ensure_harness(recipe: Recipe, cache: Path, on_step: OnStep = lambda step: None) -> InstalledHarness:
    """The harness of a recipe with a package, installed if need be. Needs no network once in the cache.

    Raises:
        SetupError: no room or no network, or the package is not what the recipe says; says what to do.
    """
    prefix = _prefix(recipe, cache)

    def build(folder: Path) -> None:
        on_step(f"Installing {recipe.title} {recipe.version} into {folder}")
        log = folder.with_name(f"{folder.name}.log")
        log.write_text("")
        (_install_npm if recipe.install.npm else _install_pip)(recipe, folder, cache, log, on_step)
        _open_to_others(folder)
        installed = _installed(recipe, folder, cache, on_step)
        on_step(f"{recipe.title} {recipe.version}: {installed.size_bytes / 1e6:.0f} MB")

    if not is_installed(recipe, cache):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        build_once(prefix, _package(recipe), _holds(recipe), build, on_step, _GIGABYTES)
    return _installed(recipe, prefix, cache, on_step)


def is_installed(recipe: Recipe, cache: Path) -> bool:
    """Whether the cache holds the whole of it."""
    return is_built(_prefix(recipe, cache), _package(recipe), _holds(recipe))


def _prefix(recipe: Recipe, cache: Path) -> Path:
    return cache.absolute() / "harness" / f"{recipe.program}-{recipe.version}"


def _package(recipe: Recipe) -> str:
    if recipe.install.npm:
        return f"{recipe.install.npm}@{recipe.version}"
    return f"{recipe.install.pip}=={recipe.version}"


def _holds(recipe: Recipe) -> str:
    return "node_modules" if recipe.install.npm else "bin/python"


def _install_npm(recipe: Recipe, folder: Path, cache: Path, log: Path, on_step: OnStep) -> None:
    npm = shutil.which("npm")
    # npm silently picks older packages for an older node; a native program's version and parts are exact.
    directory = Path(npm).parent if npm and not recipe.install.node else ensure_node(cache, on_step)
    # A package's own install scripts would run here, outside any sandbox; no recipe needs them.
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    command: list[str | Path] = [directory / "npm", "install", "--prefix", folder, *quiet, _package(recipe)]
    run(command, f"installing {_package(recipe)}", log, with_path(directory))


def _install_pip(recipe: Recipe, folder: Path, cache: Path, log: Path, on_step: OnStep) -> None:
    make_environment(folder, log)
    command: list[str | Path] = [
        folder / "bin/python",
        "-m",
        "pip",
        "install",
        "--no-input",
        _package(recipe),
    ]
    run(command, f"installing {_package(recipe)}", log)


def _open_to_others(folder: Path) -> None:
    """Readable whatever our umask is: as root the harness runs as somebody else."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o444 | (0o111 if mode & 0o100 else 0))


def _installed(recipe: Recipe, prefix: Path, cache: Path, on_step: OnStep) -> InstalledHarness:
    install = recipe.install
    shown = [_one(prefix, pattern, recipe) for pattern in install.show]
    path = [str(_one(prefix, pattern, recipe)) for pattern in install.path]
    command = [str(_one(prefix, install.binary, recipe))]
    if install.script is not None:
        shown.append(install.script)
        command.append(str(install.script))
    if install.node:
        node = ensure_node(cache, on_step)
        shown.append(node.parent)
        path.append(str(node))
    return InstalledHarness(recipe.name, recipe.version, tuple(command), prefix, tuple(shown), tuple(path))


def _one(prefix: Path, pattern: str, recipe: Recipe) -> Path:
    found = sorted(prefix.glob(pattern)) if pattern else [prefix]
    if len(found) != 1:
        raise SetupError(
            f"{recipe.title} {recipe.version}: {len(found)} files match {pattern} in its package, not one; "
            "does it exist for this machine?"
        )
    return found[0]
