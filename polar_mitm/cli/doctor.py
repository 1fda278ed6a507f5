"""`polar-mitm doctor`: what this machine lacks, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_mitm.cli.exits import NO
from polar_mitm.cli.output import JsonFlag, print_json, print_table, progress, say, tell
from polar_mitm.errors import SetupError

if TYPE_CHECKING:
    from polar_mitm_sandbox.doctor import Check

_MIN_FREE_GB = 5.0  # the engine's environment, the default model, node, two harnesses
_MIN_MEMORY_GB = 6.0  # vLLM on the CPU with the default model, beside a harness


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Install what is missing, as far as that goes.")] = False,
    json: JsonFlag = False,
) -> None:
    """Say what this machine lacks, and how to get it.

    --fix installs bubblewrap (as root, with apt-get), vLLM in an environment
    of its own, the default model and the harnesses; what is there already is
    left alone. Exit code 1 if something required is missing.
    """
    problems = repair() if fix else []
    found = checks()
    ok = all(c.ok for c in found if c.required)
    if json:
        print_json({"ok": ok, "checks": found, "problems": problems})
    else:
        print_table(",what,found", [(_mark(c), c.name, c.detail) for c in found])
        for check in (c for c in found if not c.ok):
            tell(f"{'NEEDED' if check.required else 'optional'}: {check.name}: {check.fix}")
        for problem in problems:
            say(f"could not be fixed: {problem}", style="yellow")
        tell("all that is required is here" if ok else "something that is required is missing")
    if not ok:
        raise typer.Exit(NO)


def checks() -> list[Check]:
    """All findings, sandboxes' first."""
    from polar_mitm.cache import default_cache
    from polar_mitm_sandbox.doctor import doctor as sandbox_checks

    cache = default_cache()
    return [*sandbox_checks(cache), *_engine(cache), *_libraries(), *_machine(cache)]


def repair() -> list[str]:
    """Install bubblewrap (as root), vLLM and the default model, the harnesses; returns what failed."""
    from polar_mitm import engine
    from polar_mitm.cli.run import install
    from polar_mitm_sandbox import recipes

    problems = []
    if problem := install_bubblewrap():
        problems.append(problem)
    try:
        with progress() as step:
            engine.ensure_env(engine.default_cache(), step)
            engine.ensure_model(engine.default_cache(), None, step)
    except (SetupError, OSError) as error:
        problems.append(str(error))
    for name in recipes.available():
        try:
            install(recipes.load(name))
        except (SetupError, OSError) as error:
            problems.append(str(error))
    return problems


def install_bubblewrap() -> str | None:
    """Get bwrap where that is possible without asking; a sentence on what to do where it is not."""
    if shutil.which("bwrap"):
        return None
    if os.getuid() != 0 or not shutil.which("apt-get"):
        return (
            "bubblewrap is missing: install it with the system's package manager (apt-get install bubblewrap)"
        )
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with progress("installing bubblewrap with apt-get"):
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "bubblewrap"]):
            done = subprocess.run(
                ["apt-get", *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=environment,
            )
            if done.returncode != 0:
                return f"apt-get could not install bubblewrap: {done.stderr.strip()[-300:]}"
    return None


def _engine(cache: Path) -> list[Check]:
    from polar_mitm import engine
    from polar_mitm_sandbox.doctor import Check

    installed = engine.is_installed(cache)
    detail = "vLLM is in the cache" if installed else "vLLM is not installed yet"
    found = [Check("engine", installed, detail, "polar-mitm engine up, or --engine URL", required=False)]
    if (state := engine.status()) is not None:
        found.append(
            Check("engine running", True, f"{state.url} ({state.served_model_name})", required=False)
        )
    return found


def _libraries() -> list[Check]:
    from polar_mitm_sandbox.doctor import Check

    h11 = version("h11")
    sound = tuple(int(part) for part in h11.split(".")[:2]) >= (0, 16)
    advice = (
        "h11 before 0.16 accepts malformed chunks (CVE-2025-43859): use Python 3.12 or later, or "
        "`pip install h11==0.16.0` in spite of mitmproxy 11.0.2's pin"
    )
    found = [
        Check("python", True, f"{platform.python_version()} at {sys.prefix}", required=False),
        Check("mitmproxy", True, version("mitmproxy"), required=False),
        Check("h11", sound, h11, advice, required=False),
        Check("duckdb", True, version("duckdb"), required=False),
    ]
    return found + [_extension(name) for name in ("httpfs", "quack")]


def _extension(name: str) -> Check:
    """A wheel of the very version of DuckDB; without it nobody reads a capture that is running."""
    from polar_mitm_sandbox.doctor import Check

    package = f"duckdb-extension-{name}"
    wanted = version("duckdb")
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "not installed"
    return Check(package, found == wanted, found, f"pip install {package}=={wanted}")


def _machine(cache: Path) -> list[Check]:
    from polar_mitm_sandbox.doctor import Check

    place = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    room = f"{_MIN_FREE_GB:g} GB make room for all; POLAR_MITM_CACHE may point to another disk"
    size = f"the managed engine wants {_MIN_MEMORY_GB:g} GB; --engine URL takes one that runs elsewhere"
    return [
        Check(
            "cache", os.access(place, os.W_OK), str(cache), "POLAR_MITM_CACHE names another", required=False
        ),
        Check("disk", free >= _MIN_FREE_GB, f"{free:.1f} GB free", room, required=False),
        Check("memory", memory >= _MIN_MEMORY_GB, f"{memory:.1f} GB", size, required=False),
    ]


def _mark(check: Check) -> str:
    return "ok" if check.ok else "NO" if check.required else "no"
