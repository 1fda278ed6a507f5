"""Imports point one way, and a bare `import polar_mitm` stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts() -> None:
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_core_loads_nothing_heavy() -> None:
    code = (
        "import sys, polar_mitm, polar_mitm.cli, polar_mitm.exchange, polar_mitm.dialects.registry\n"
        "print(*{'mitmproxy', 'torch', 'transformers', 'docker'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
