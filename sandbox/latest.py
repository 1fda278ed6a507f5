"""Which version of a harness its registry holds to be the newest."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from polar_mitm.engine.build import clean_environment
from polar_mitm.engine.node import ensure_node, with_path
from polar_mitm.errors import SetupError
from polar_mitm_sandbox.recipes import Recipe

_TIMEOUT_S = 120


def newest_version(recipe: Recipe, cache: Path) -> str:
    """The newest version of a recipe's package, by npm's `latest` or PyPI's newest release.

    Raises:
        SetupError: the recipe has no package, or the registry does not say.
    """
    install = recipe.install
    if install.npm:
        npm = shutil.which("npm")
        directory = Path(npm).parent if npm else ensure_node(cache, lambda step: None)
        command = [str(directory / "npm"), "view", install.npm, "version", "--loglevel=error"]
        found = re.fullmatch(r"(\S+)", _ask(command, recipe, with_path(directory)).strip())
    elif install.pip:
        command = [sys.executable, "-m", "pip", "index", "versions", install.pip, "--no-input"]
        found = re.search(r"\((\S+)\)", _ask(command, recipe, clean_environment()))
    else:
        raise SetupError(f"{recipe.name} has no package, so there is no newest version of it")
    if found is None:
        raise SetupError(f"the registry does not say which version of {recipe.name} is the newest")
    return found[1]


def _ask(command: list[str], recipe: Recipe, env: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=env,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"cannot look up the newest version of {recipe.name}: {error}") from error
    if done.returncode != 0:
        raise SetupError(f"cannot look up the newest version of {recipe.name}: {done.stderr.strip()[-300:]}")
    return done.stdout
