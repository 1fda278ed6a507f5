"""The newest version is what the package's registry says, or a sentence why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from polar_mitm.errors import SetupError
from polar_mitm_sandbox import recipes
from polar_mitm_sandbox.latest import newest_version


def npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An npm on PATH that is this shell script."""
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_npm_is_asked_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path, monkeypatch, '[ "$1 $2 $3" = "view @openai/codex version" ] && echo 9.8.7-beta.1')
    assert newest_version(recipes.load("codex"), tmp_path) == "9.8.7-beta.1"


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo no such package >&2; exit 1", "no such package"),
        ("true", "does not say"),
        ("echo a b", "does not say"),
    ],
)
def test_a_registry_that_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, complaint: str
) -> None:
    npm(tmp_path, monkeypatch, script)
    with pytest.raises(SetupError, match=complaint):
        newest_version(recipes.load("codex"), tmp_path)


def test_pip_is_asked_where_the_package_is_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "some_agent-1.10.0-py3-none-any.whl"
    wheel.with_name("some_agent-1.9.0-py3-none-any.whl").touch()
    wheel.touch()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    own = recipes.load("sdk-agent")
    agent = replace(own, install=replace(own.install, pip="some-agent"))
    assert newest_version(agent, tmp_path) == "1.10.0"


def test_a_program_on_path_has_no_newest_version(tmp_path: Path) -> None:
    own = recipes.load("codex")
    with pytest.raises(SetupError, match="no package"):
        newest_version(replace(own, install=replace(own.install, npm=None)), tmp_path)
