"""Verdicts, of functions and of commands."""

from __future__ import annotations

import asyncio
import math
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_mitm import workspace
from polar_mitm.rewards import NoVerdict, Verdict, judge, verdict_of, verifier
from polar_mitm.tasks import Attempt, Task


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., Any]:
    """The verdict of a reward on a workspace with one file."""

    async def call(reward: Any, **fields: Any) -> Verdict:
        left = tmp_path / "left"
        workspace.make(left, {"answer.txt": "42"})
        (left / "passwd").symlink_to("/etc/passwd")
        scratch = tmp_path / "scratch"
        task = Task("t", "think", {"given": "x"}, reward, metadata={"right": "42"}, **fields)
        try:
            return await judge(Attempt(task, left, "last “words”\n", 3, "failed"), scratch)
        finally:
            assert (left / "answer.txt").read_text() == "42"

    return call


class Odd:
    """As tensors are: they have `__float__`, and it raises what it likes."""

    def __float__(self) -> float:
        raise RuntimeError("not a scalar")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def runs(pid: str) -> bool:
    """Is it there, and no zombie that waits for its parent?"""
    state = Path("/proc", pid, "stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "given, verdict",
    [
        (1, Verdict(1.0)),
        (True, Verdict(1.0)),
        (np.float32(0.5), Verdict(0.5)),
        ((0.25, "a quarter"), Verdict(0.25, "a quarter")),
        ({"reward": False}, Verdict(0.0)),
        ({"reward": -2, "evidence": "bad", "format": True}, Verdict(-2.0, "bad", {"format": 1.0})),
        (Verdict(3.0), Verdict(3.0)),
    ],
)
def test_what_is_a_verdict(given: Any, verdict: Verdict) -> None:
    assert verdict_of(given) == verdict


@pytest.mark.parametrize(
    "given",
    [
        *(None, "1.0", math.nan, math.inf, 10**400, [], (1, 2, 3), object()),
        *({}, {"evidence": "x"}, {"reward": "1"}, {"reward": 1, "other": None}),
    ],
)
def test_what_is_none(given: Any) -> None:
    with pytest.raises(NoVerdict, match="no finite number"):
        verdict_of(given)


def test_long_evidence_is_cut() -> None:
    assert len(verdict_of((1, "x" * 10**6)).evidence) == 10_000


async def test_a_function(judged: Callable[..., Any]) -> None:
    def score(attempt: Attempt) -> Any:
        assert {path.name for path in attempt.workspace.iterdir()} == {"answer.txt"}
        answer = attempt.workspace / "answer.txt"
        found = answer.read_text()
        answer.write_text("scribbled over")
        ended = attempt.status, attempt.exit_code, attempt.stdout
        assert ended == ("failed", 3, "last “words”\n")
        return {"reward": found == attempt.task.metadata["right"], "evidence": found}

    assert await judged(score) == Verdict(1.0, "42")
    assert verifier(Task("t", "p", reward=score)).endswith("score")


async def test_a_command(judged: Callable[..., Any]) -> None:
    code = (
        "import json, os\n"
        "task = json.load(open(os.environ['POLAR_TASK']))\n"
        "said = open(os.environ['POLAR_STDOUT']).read()\n"
        "assert os.listdir() == ['answer.txt'], os.listdir()\n"
        "right = open('answer.txt').read() == task['metadata']['right']\n"
        "ended = [os.environ[name] for name in ('POLAR_STATUS', 'POLAR_EXIT_CODE')]\n"
        "evidence = [task['task_id'], task['prompt'], said, *ended]\n"
        "print('noise', flush=True)\n"
        "print(json.dumps({'reward': right, 'evidence': evidence, 'length': len(said)}), end='\\n \\n')\n"
    )  # fmt: skip
    evidence = ["t", "think", "last “words”\n", "failed", "3"]
    assert await judged(python(code)) == Verdict(1.0, str(evidence), {"length": 13.0})


@pytest.mark.parametrize("printed, value", [("0.5", 0.5), ("x\n-1\n", -1.0), (".5", 0.5), ("true", 1.0)])
async def test_a_command_prints_a_number(judged: Callable[..., Any], printed: str, value: float) -> None:
    assert await judged(python(f"print({printed!r})")) == Verdict(value)


@pytest.mark.parametrize(
    "reward, complaint",
    [
        (python("print(1); raise SystemExit(2)"), "ended with 2: without a word"),
        (python("print(1); raise ValueError('so bad')"), "ended with 1: ValueError: so bad"),
        (python("pass"), "no number"),
        (python("print('nan')"), "no finite number"),
        (python("print('reward: 1')"), "no number and no JSON"),
        (python("print('[' * 10**5)"), "no number and no JSON"),
        (python("import os; os.kill(os.getpid(), 9)"), "ended with -9"),
        (["/nowhere/to/be/found"], "cannot be run"),
        (lambda attempt: 1 / 0, r"ZeroDivisionError.* at .*test_rewards.py:\d+"),
        (lambda attempt: sys.exit(0), "SystemExit"),
        (lambda attempt: Verdict(math.nan), "no finite number"),
        (lambda attempt: Odd(), "RuntimeError.*not a scalar"),
        (lambda attempt: next(iter(())), "StopIteration"),
        (lambda attempt: None, "no finite number: None"),
    ],
)
async def test_a_reward_that_fails(judged: Callable[..., Any], reward: Any, complaint: str) -> None:
    with pytest.raises(NoVerdict, match=complaint):
        await judged(reward)


async def test_a_function_that_hangs_holds_up_nobody(judged: Callable[..., Any]) -> None:
    go = threading.Event()
    with pytest.raises(NoVerdict, match=r"within 0.2 s"):
        await judged(lambda attempt: go.wait(), reward_timeout_s=0.2)
    go.set()


async def test_a_command_that_hangs_is_killed_with_its_children(
    judged: Callable[..., Any], tmp_path: Path
) -> None:
    note = tmp_path / "pids"
    script = f"sleep 1000 & echo $$ $! > {shlex.quote(str(note))}; wait"
    with pytest.raises(NoVerdict, match="within 2 s"):
        await judged(["sh", "-c", script], reward_timeout_s=2)
    async with asyncio.timeout(30):  # a signal takes its time
        while any(map(runs, note.read_text().split())):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_command_that_leaves_something_behind(judged: Callable[..., Any]) -> None:
    """A daemon that got away has its outputs open; the verdict does not wait for it."""
    script = "setsid sleep 5 & echo 0.75"
    assert await judged(["sh", "-c", script], reward_timeout_s=4) == Verdict(0.75)


async def test_a_cancelled_command_is_killed(judged: Callable[..., Any], tmp_path: Path) -> None:
    note = tmp_path / "pid"
    judging = asyncio.create_task(
        judged(["sh", "-c", f"echo $$ > {note}.new; mv {note}.new {note}; sleep 1000"])
    )
    async with asyncio.timeout(30):
        while not note.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    judging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await judging
    assert not runs(note.read_text().strip())


async def test_metadata_that_are_no_json(tmp_path: Path) -> None:
    workspace.make(tmp_path / "left", {})
    task = Task("t", "p", reward=["true"], metadata={"x": {1}})
    with pytest.raises(NoVerdict, match="no JSON"):
        await judge(Attempt(task, tmp_path / "left", "", 0, "completed"), tmp_path / "scratch")


async def test_a_workspace_that_is_too_large(tmp_path: Path) -> None:
    left, scratch = tmp_path / "large", tmp_path / "large-scratch"
    workspace.make(left, {})
    with (left / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(NoVerdict, match="holds more than"):
        await judge(Attempt(Task("t", "p", reward=lambda a: 1), left, "", 0, "completed"), scratch)
