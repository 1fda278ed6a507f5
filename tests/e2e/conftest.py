"""What the end-to-end tests stand on: installed harnesses, a scripted engine, a real vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polar_mitm import engine
from tests.support.scripted_engine import ScriptedEngine
from tests.support.scripts import write_file_in_two_turns

POLAR_MITM = Path(sysconfig.get_path("scripts")) / "polar-mitm"
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli() -> Cli:
    """Runs the installed command as a user would; its output comes back as text."""

    def call(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        command = [str(POLAR_MITM), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return call


@pytest.fixture
async def writing_engine() -> AsyncIterator[ScriptedEngine]:
    """A scripted engine that makes any harness write `hello.txt`, in a process of its own loop."""
    async with ScriptedEngine(write_file_in_two_turns("hello.txt", "hi")) as scripted:
        yield scripted


@pytest.fixture(scope="session")
def vllm() -> Iterator[engine.EngineState]:
    """The managed engine with the default model; started here unless it runs already."""
    running = engine.status()
    state = running or engine.up(on_step=lambda step: print(step, file=sys.stderr))
    yield state
    if running is None:
        engine.down()


def last_json(text: str) -> Any:
    """The JSON document that a `--json` command ends with."""
    return json.loads(text.strip().splitlines()[-1])
