"""What the end-to-end tests stand on: the command line as users run it, scripted engines, a real vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from polar_mitm import engine
from polar_mitm.cache import default_cache
from polar_mitm.dialects.responses_socket import PREWARM
from polar_mitm.types import ModelCall
from polar_mitm_sandbox import recipes
from polar_mitm_sandbox.install import ensure_harness
from tests.e2e.sessions import HARNESSES
from tests.support.record_fixtures import POLAR_MITM

DEADLINE_S = 120
"""Against hangs; whatever is waited for takes a fraction of it."""


@dataclass
class Ended:
    """What a command came to."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The JSON document that a `--json` command ends with."""
        return json.loads(self.out.strip().splitlines()[-1])


@dataclass
class Started:
    """A `polar-mitm` command under way. `mark` is in the environment of everything in its sandbox."""

    process: asyncio.subprocess.Process
    mark: str

    async def ended(self, deadline_s: float = DEADLINE_S) -> Ended:
        async with asyncio.timeout(deadline_s):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return Ended(self.process.returncode, out.decode(), err.decode())

    async def line(self) -> str:
        """The next line of its standard output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            return (await self.process.stdout.readline()).decode()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """A signal to the command alone."""
        self.process.send_signal(number)

    def leftovers(self) -> list[str]:
        """Processes that have the mark, in their environment or on their command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                seen = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:  # it has ended, or is somebody else's
                continue
            if self.mark.encode() in seen:
                found.append(seen.partition(b"\0")[0].decode())
        return found


@dataclass
class Cli:
    """Starts the installed command, as a user would; `become` is a prefix that makes it another user's."""

    env: dict[str, str]
    become: Sequence[str] = ()
    started: list[Started] = field(default_factory=list)

    async def start(self, *arguments: object) -> Started:
        process = await asyncio.create_subprocess_exec(
            *self.become, POLAR_MITM, *map(str, arguments),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=self.env,
            start_new_session=True, limit=1 << 24,
        )  # fmt: skip
        self.started.append(Started(process, ""))
        return self.started[-1]

    async def run(self, *options: object, command: Sequence[object], task: Path | None = None) -> Started:
        """`polar-mitm run` of a command, on a new task directory unless one is given."""
        mark = uuid.uuid4().hex
        given = [*options, "--env", f"POLAR_TEST_MARK={mark}"] + (["--task-dir", task] if task else [])
        run = await self.start("run", *given, "--", *command)
        run.mark = mark
        return run

    async def __call__(self, *arguments: object) -> Ended:
        return await (await self.start(*arguments)).ended()


@pytest.fixture(scope="session", autouse=True)
def harnesses() -> None:
    """The real programs, at the recipes' versions; in the cache after `polar-mitm doctor --fix`."""
    for name in HARNESSES:
        ensure_harness(recipes.load(name), default_cache(), lambda step: print(step, file=sys.stderr))


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Cli]:
    """What is still running when the test ends is killed; sandboxes die with their runner."""
    cli = Cli({**os.environ, "TERM": "dumb", "TMPDIR": str(tmp_path)})
    yield cli
    for each in cli.started:
        if each.process.returncode is None:
            os.killpg(each.process.pid, signal.SIGKILL)
            await each.process.wait()


@pytest.fixture(scope="session")
def vllm() -> Iterator[engine.EngineState]:
    """The managed engine with the default model; started here unless it runs already."""
    running = engine.status()
    state = running or engine.up(on_step=lambda step: print(step, file=sys.stderr))
    yield state
    if running is None:
        engine.down()


def sampled(calls: Iterable[ModelCall]) -> list[ModelCall]:
    """The calls that the engine was asked: Codex also warms up its connection, which is recorded."""
    return [call for call in calls if PREWARM not in call.notes]


async def until(condition: Callable[[], Any], what: str, *meanwhile: Started) -> None:
    """Wait for what has no event of its own, `meanwhile` commands are running."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.02)
                for each in meanwhile:
                    assert each.process.returncode is None, (what, await each.ended())
    except TimeoutError:
        raise AssertionError(f"waited in vain: {what}") from None
