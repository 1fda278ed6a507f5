"""`polar-mitm doctor`: what this machine lacks, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_mitm.cli.output import JsonFlag, print_json, print_table, say
from polar_mitm.errors import EngineUnfit, SetupError

if TYPE_CHECKING:
    from polar_mitm_sandbox.doctor import Check


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Install what can be installed.")] = False,
    json: JsonFlag = False,
) -> None:
    """Check sandboxes, engine, harnesses and libraries. Exit code 1 if something required is missing."""
    if fix:
        for problem in repair():
            say(f"[yellow]{problem}[/yellow]")
    found = checks()
    if json:
        print_json({"ok": all(c.ok for c in found if c.required), "checks": found})
    else:
        rows = [(_mark(c), c.name, c.detail, "" if c.ok else c.fix) for c in found]
        print_table("polar-mitm doctor", "ok what found how_to_get_it", rows)
    if not all(c.ok for c in found if c.required):
        raise typer.Exit(1)


def checks() -> list[Check]:
    """All findings, sandboxes' first."""
    from polar_mitm.cache import default_cache
    from polar_mitm_sandbox.doctor import doctor as sandbox_checks

    return [*sandbox_checks(default_cache()), *_libraries(), _engine(default_cache())]


def repair() -> list[str]:
    """Install bubblewrap (as root), vLLM and the default model, the harnesses; returns what failed."""
    from polar_mitm import engine
    from polar_mitm.cli.run import install
    from polar_mitm_sandbox import recipes

    problems = []
    if problem := install_bubblewrap():
        problems.append(problem)
    try:
        engine.ensure_env(engine.default_cache(), say)
        engine.ensure_model(engine.default_cache(), None, say)
    except (SetupError, EngineUnfit) as error:
        problems.append(str(error))
    for name in recipes.available():
        try:
            install(recipes.load(name))
        except SetupError as error:
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
    say("installing bubblewrap with apt-get")
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "bubblewrap"]):
        done = subprocess.run(["apt-get", *command], capture_output=True, text=True)
        if done.returncode != 0:
            return f"apt-get could not install bubblewrap: {done.stderr.strip()[-300:]}"
    return None


def _libraries() -> list[Check]:
    from polar_mitm_sandbox.doctor import Check

    h11 = version("h11")
    sound = tuple(int(part) for part in h11.split(".")[:2]) >= (0, 16)
    return [
        Check("python", True, platform.python_version(), required=False),
        Check("mitmproxy", True, version("mitmproxy"), required=False),
        Check(
            "h11",
            sound,
            h11,
            "h11 before 0.16 accepts malformed chunks (CVE-2025-43859): use Python 3.12 or later, or "
            "`pip install h11==0.16.0` in spite of mitmproxy 11.0.2's pin",
            required=False,
        ),
        Check("duckdb", True, version("duckdb"), required=False),
    ]


def _engine(cache: Path) -> Check:
    from polar_mitm import engine
    from polar_mitm_sandbox.doctor import Check

    state = engine.status()
    if state is not None:
        return Check("engine", True, f"running at {state.url}", required=False)
    present = engine.is_installed(cache)
    detail = "installed, not running" if present else "not installed"
    return Check("engine", present, detail, "polar-mitm engine up, or --engine URL", required=False)


def _mark(check: Check) -> str:
    return "yes" if check.ok else "NO" if check.required else "no"
