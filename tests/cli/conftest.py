"""Running commands, in this process where that is enough, and what they need: a store, an engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.cli import main
from polar_mitm.store import Recorder
from polar_mitm.types import EgressEvent, ModelCall, Rollout, Usage, Wire

ROOT = Path(__file__).parents[2]
POLAR_MITM = Path(sysconfig.get_path("scripts")) / "polar-mitm"


@dataclass
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)


Polar = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands make in the folder for temporary files goes with the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def polar(capfd: pytest.CaptureFixture[str]) -> Polar:
    """Runs a command in this process. A traceback would be a bug, whatever the command."""

    def call(*arguments: object) -> Result:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as end:
            main([str(each) for each in arguments])
        for number, handler in before.items():  # else nobody could end the tests in good order
            signal.signal(number, handler)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert isinstance(end.value.code, int)
        return Result(end.value.code, out, err)

    return call


def launch(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A command as a process of its own, for signals and for what it leaves behind."""
    command = [str(POLAR_MITM), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, **options)


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Result:
    """Its end."""
    out, err = process.communicate(timeout=timeout)
    assert "Traceback" not in err
    return Result(process.returncode, out, err)


@contextmanager
def scripted_engine() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A scripted engine in a process of its own, which makes any harness write `hello.txt`; and its URL."""
    command = [sys.executable, "-m", "polar_mitm.conformance.scripted_engine", "--content", "hi"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.terminate()


@pytest.fixture(scope="session")
def engine_url() -> Iterator[str]:
    with scripted_engine() as (_, url):
        yield url


def sampled(rollout_id: str, seq: int, num_prompt: int, num_sampled: int, **fields: Any) -> ModelCall:
    """A call whose prompt is that of the one before it, its answer, and a little more."""
    return ModelCall(
        f"{rollout_id}-call-{seq}",
        rollout_id,
        seq,
        "anthropic",
        "messages",
        "ok",
        finish_reason="stop",
        delivered=True,
        prompt_token_ids=list(range(1, num_prompt + 1)),
        completion_token_ids=list(range(num_prompt + 1, num_prompt + num_sampled + 1)),
        behaviour_logprobs=[-0.25] * num_sampled,
        usage=Usage(num_prompt, num_sampled),
        started_at=100.0,
        first_token_at=100.5,
        ended_at=102.5,
        wire=Wire("POST", "api.anthropic.com", "/v1/messages", [], b'{"ask": 1}', 200, [], b"the answer"),
        **fields,
    )


def record(path: Path, rollouts: list[Rollout], calls: list[ModelCall], events: list[EgressEvent]) -> None:
    """A store with these records."""
    with Recorder(path, share=False) as recorder:
        done = [recorder.rollout(r) for r in rollouts] + [recorder.call(c) for c in calls]
        for event in events:
            recorder.egress(event)
        assert all(each.result(30) for each in done)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rollouts: one of two calls that continue each other, one with a hole in its record."""
    path = tmp_path_factory.mktemp("stores") / "runs.duckdb"
    rollouts = [
        Rollout("rollout-A", harness="claude-code", harness_version="1.2", status="completed", exit_code=0),
        Rollout("rollout-B", harness="codex", status="failed", exit_code=3, incomplete="the disk was full"),
    ]
    calls = [
        sampled("rollout-A", 0, 10, 4),
        sampled("rollout-A", 1, 20, 6),
        sampled("rollout-B", 0, 10, 5, error="\x1b[2Jcleared [/red] \x07"),
    ]
    events = [
        EgressEvent("rollout-A", 101.0, "refused", "dns", "evil.example\x1b[31m"),
        EgressEvent("rollout-A", 101.0, "refused", "dns", "[/bold]telemetry.example"),
        EgressEvent("rollout-A", 102.0, "refused", "dns", "[/bold]telemetry.example"),
        EgressEvent("rollout-A", 102.0, "stubbed", "path", "HEAD api.anthropic.com/"),
    ]
    record(path, rollouts, calls, events)
    return path
