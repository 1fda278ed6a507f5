"""Verdicts: what a rollout's attempt at a task is worth.

A reward runs on the host, outside the agent's sandbox and after everything in it has died, so nothing inside
can reach it. What it looks at is a copy of the workspace that no link leads out of. **A reward that executes
what the agent wrote executes it on the host**, as the user who runs polar-mitm: read and compare files, or
bring an isolation of your own: evaluators in fresh containers come with a later version.

A function gets an `Attempt` and returns what `RewardFunction` says. It runs in a thread of this process; what
computes for long is better a command.

A command runs in the copy. $POLAR_STDOUT names a file with what the harness printed, $POLAR_TASK one with
the task as JSON (task_id, prompt, metadata); $POLAR_STATUS and $POLAR_EXIT_CODE tell how the rollout ended.
The last line that it prints is the reward: a number, or {"reward": 0.5, "evidence": "...", "other": 1.0}
with further figures by name. With any exit code but 0 there is no verdict.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import threading
from asyncio.subprocess import DEVNULL
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polar_mitm import workspace
from polar_mitm.tasks import Attempt, RewardFunction, Task, located

MAX_OUTPUT_BYTES = 1 << 20
_MAX_EVIDENCE = 10_000  # characters


def which_counts(names: Collection[str], asked: str | None = None) -> str | None:
    """Whose verdict is the reward: the one asked for, the only one, or "reward", as `collect` and `rl` say.

    None where there is no verdict, or none of several is "reward".
    """
    if asked is not None:
        return asked
    return next(iter(names)) if len(names) == 1 else "reward" if "reward" in names else None


@dataclass(frozen=True)
class Verdict:
    """A reward, why, and further figures by name, which train nothing."""

    value: float
    evidence: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


class NoVerdict(Exception):
    """A reward failed, or said nothing that is one; the message says how."""


def verifier(task: Task) -> str:
    """Who judges a task, for the record."""
    if task.reward is None:
        return ""
    return getattr(task.reward, "__qualname__", "") if callable(task.reward) else " ".join(task.reward)


async def judge(attempt: Attempt, scratch: Path) -> Verdict:
    """The verdict on an attempt, in whose `workspace` nobody works any more; the reward gets a copy.

    Args:
        scratch: a folder, made for the copy and what goes with it; to be removed by the caller.

    Raises:
        NoVerdict: the reward failed, took too long, or gave no finite number; or the workspace is too large.
    """
    task, copied = attempt.task, scratch / "workspace"
    assert task.reward is not None
    try:
        await asyncio.to_thread(workspace.copy, attempt.workspace, copied)
        attempt = replace(attempt, workspace=copied)
        async with asyncio.timeout(task.reward_timeout_s):
            if callable(task.reward):
                return await _by_function(task.reward, attempt)
            return await _by_command(task.reward, attempt, scratch)
    except TimeoutError:
        raise NoVerdict(f"no verdict within {task.reward_timeout_s:g} s") from None
    except (workspace.TooLarge, OSError) as error:
        raise NoVerdict(f"the workspace cannot be judged: {error}") from None


def verdict_of(given: Any) -> Verdict:
    """What a function returned or a command printed, as a verdict.

    Raises:
        NoVerdict: it is none.
    """
    if isinstance(given, Verdict):
        given = {**given.metrics, "reward": given.value, "evidence": given.evidence}
    evidence, metrics, value = "", {}, given
    if isinstance(given, Mapping):
        metrics = dict(given)
        value, evidence = metrics.pop("reward", None), metrics.pop("evidence", "")
    elif isinstance(given, tuple | list) and len(given) == 2:
        value, evidence = given
    return Verdict(
        _number(value, given),
        str(evidence)[:_MAX_EVIDENCE],
        {str(name): _number(each, given) for name, each in metrics.items()},
    )


async def _by_function(function: RewardFunction, attempt: Attempt) -> Verdict:
    """In a thread that nobody waits for in vain: a function that hangs holds up neither us nor our end."""
    done: Future[Verdict] = Future()
    done.set_running_or_notify_cancel()

    def work() -> None:
        try:
            done.set_result(verdict_of(function(attempt)))
        except NoVerdict as error:
            done.set_exception(error)
        except BaseException as error:
            done.set_exception(NoVerdict(f"the reward failed: {located(error)}"))

    threading.Thread(target=work, name="polar-mitm-reward", daemon=True).start()
    return await asyncio.wrap_future(done)


async def _by_command(command: Sequence[str], attempt: Attempt, scratch: Path) -> Verdict:
    task, printed, told = attempt.task, scratch / "stdout", scratch / "task.json"
    printed.write_text(attempt.stdout)
    try:
        fields = {"task_id": task.task_id, "prompt": task.prompt, "metadata": dict(task.metadata)}
        told.write_text(json.dumps(fields))
    except (TypeError, ValueError) as error:
        raise NoVerdict(f"the task's metadata are no JSON: {error}") from None
    env = {
        **os.environ,
        "POLAR_STDOUT": str(printed),
        "POLAR_TASK": str(told),
        "POLAR_STATUS": attempt.status,
        "POLAR_EXIT_CODE": str(attempt.exit_code),
    }
    code, out, err = await _output(command, attempt.workspace, env, scratch)
    if code:
        raise NoVerdict(f"the reward command ended with {code}: {_last_line(err) or 'without a word'}")
    line = _last_line(out)
    with suppress(ValueError):
        return verdict_of(float(line))
    with suppress(ValueError, RecursionError):
        return verdict_of(json.loads(line))
    raise NoVerdict(f"the reward command's last line is no number and no JSON: {line[:200]!r}")


async def _output(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], scratch: Path
) -> tuple[int, bytes, bytes]:
    """Exit code and ends of both outputs of a command; it and what it began end with us."""
    # Files, as a pipe has no end while a process that got away from its group holds it open.
    paths = scratch / "reward.out", scratch / "reward.err"
    with paths[0].open("wb") as out, paths[1].open("wb") as err:
        try:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=cwd, env=env, stdin=DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise NoVerdict(f"the reward command cannot be run: {error}") from None
    try:
        code = await process.wait()
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return code, _end_of(paths[0]), _end_of(paths[1])


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_OUTPUT_BYTES))
        return file.read(MAX_OUTPUT_BYTES)


def _last_line(output: bytes) -> str:
    return output.decode(errors="replace").rstrip().rpartition("\n")[2].strip()


def _number(value: Any, given: Any) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise NoVerdict(f"the reward gave no finite number: {given!r:.200}")
    return number
