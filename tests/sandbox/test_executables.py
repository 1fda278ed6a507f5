"""Shims of version managers are not what a sandbox runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm.errors import SetupError
from polar_mitm_sandbox import executables


def _program(folder: Path, name: str = "tool") -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return folder


def test_the_program_behind_a_shim(tmp_path: Path) -> None:
    shims, real = _program(tmp_path / "manager" / "shims"), _program(tmp_path / "real")
    assert executables.resolve("tool", f"{shims}:{real}").program == str(real / "tool")


def test_nothing_but_a_shim(tmp_path: Path) -> None:
    shims = _program(tmp_path / "manager" / "shims")
    with pytest.raises(SetupError, match="whole path"):
        executables.resolve("tool", str(shims))
