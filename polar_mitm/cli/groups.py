"""Groups of rollouts: every task tried several times side by side, judged, and recorded with its rewards."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from polar_mitm import workspace
from polar_mitm.cli.captured import captured
from polar_mitm.cli.hosting import EmbeddedHost
from polar_mitm.cli.rollout import Job, rollout_of, run_rollout
from polar_mitm.cli.run import install, job_of
from polar_mitm.config import Settings
from polar_mitm.dialects.ids import new_id
from polar_mitm.errors import SetupError
from polar_mitm.rewards import NoVerdict, Verdict, judge, verifier
from polar_mitm.tasks import Attempt, Task
from polar_mitm.types import Reward, Rollout

if TYPE_CHECKING:
    from polar_mitm_sandbox.install import InstalledHarness
    from polar_mitm_sandbox.recipes import Recipe

REWARD = "reward"
"""The name of the verdict that training goes by; a reward's further figures have names of their own."""
MAX_STDOUT_BYTES = 1 << 20
_MAX_STDERR_BYTES = 1 << 14


@dataclass(frozen=True)
class Harness:
    """A recipe made ready once for many rollouts.

    Attributes:
        model: what the harness calls its model; the recipe's own default, or the harness's, otherwise.
        arguments: further ones, right after the program's name.
        env: further variables.
    """

    recipe: Recipe
    installed: InstalledHarness | None
    model: str | None = None
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        name: str,
        model: str | None = None,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Self:
        """By the recipe's name or file; installed if need be.

        Raises:
            SetupError: no such recipe, or it cannot be installed.
        """
        from polar_mitm_sandbox import recipes

        recipe = recipes.load(name)
        installed = install(recipe) if recipe.install.package else None
        return cls(recipe, installed, model, tuple(arguments), dict(env or {}))

    def served(self, settings: Settings) -> Settings:
        """Settings for an interceptor that serves the recipe's hosts too."""
        return settings.model_copy(update={"hosts": {**self.recipe.hosts, **settings.hosts}})

    def job(self, prompt: str) -> Job:
        """To be told `prompt`."""
        program = self.installed.command if self.installed else (self.recipe.install.binary,)
        command = [*program, *self.arguments, *self.recipe.arguments(prompt, self.model)]
        job = job_of(self.recipe, self.installed, command)
        job.env = {**job.env, **self.env}
        return job


@dataclass(frozen=True)
class GroupRollout:
    """What one rollout of a group came to.

    Attributes:
        status: as in the store; "failed" also where it did not start, and has no exit code then.
        reward: None where there is no verdict, and `no_reward` then says why.
        incomplete: why its record has holes, so that it is never trained on.
        stdout: what the harness printed; the end of it, if long. `stderr` likewise.
        workspace: where its files lie, if they were to be kept.
    """

    rollout_id: str
    sample_index: int
    status: str
    stop_reason: str
    exit_code: int | None = None
    reward: float | None = None
    no_reward: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    incomplete: str | None = None
    engine_failure: str | None = None
    calls: int = 0
    sampled_tokens: int = 0
    seconds: float = 0.0
    stdout: str = ""
    stderr: str = ""
    workspace: Path | None = None


@dataclass(frozen=True)
class Group:
    """All rollouts of one task that were begun together, by `sample_index`; each is in the store."""

    group_id: str
    task: Task
    rollouts: tuple[GroupRollout, ...]

    @property
    def rewards(self) -> list[float]:
        """Of those that have one."""
        return [each.reward for each in self.rollouts if each.reward is not None]


class GroupRunner:
    """Runs groups of rollouts on an interceptor in this process; an async context manager.

        async with embedded(harness.served(settings), engine, store) as host:
            async with GroupRunner(host, harness) as runner:
                async for group in runner.run(tasks, group_size=8):
                    ...

    When the block ends, so does every rollout that is under way, and is recorded as interrupted. A rollout
    that does not start, whose last call the engine failed to answer, or whose reward fails, has no reward;
    its group goes on without it.

    Args:
        concurrency: how many harnesses run at once; twice the cores by default, but four at least.
        timeout_s: for one rollout, where its task has none of its own. What was sampled by then is kept.
        keep: a folder for the workspaces, as ROLLOUT_ID/, instead of removing them.
    """

    def __init__(
        self,
        host: EmbeddedHost,
        harness: Harness,
        *,
        concurrency: int | None = None,
        timeout_s: float | None = None,
        keep: Path | None = None,
    ) -> None:
        self.concurrency = concurrency or max(4, 2 * len(os.sched_getaffinity(0)))
        self._host = host
        self._harness = harness
        self._timeout_s = timeout_s
        self._keep = keep
        self._running = asyncio.Semaphore(self.concurrency)
        self._judging = asyncio.Semaphore(self.concurrency)
        self._groups: set[asyncio.Task[Group]] = set()
        self._folder = Path()

    async def __aenter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="polar-mitm-groups-"))
        if self._keep:
            self._keep.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await _cancel(self._groups)
        await asyncio.to_thread(workspace.remove, self._folder)

    async def run(
        self, tasks: Iterable[Task], group_size: int, max_groups: int | None = None, *, prefix: str = ""
    ) -> AsyncGenerator[Group, None]:
        """Every task's group, as they end; only as far ahead of who takes them as `max_groups` allows.

        Args:
            tasks: in this order, maybe endless; the next one is asked for when there is room for it. Where
                there is none for now, it is asked for again when the next group is.
            max_groups: begun and not yet taken, at most; what keeps all harnesses busy by default.
            prefix: what their group ids begin with.

        Raises:
            TaskError: the source of tasks fails; what is under way is interrupted.
        """
        limit = max_groups or -(-self.concurrency // group_size) + 1
        source, under_way = iter(tasks), set[asyncio.Task[Group]]()
        try:
            while True:
                while len(under_way) < limit:
                    task = await asyncio.to_thread(next, source, None)  # may take its time
                    if task is None:
                        break
                    under_way.add(begun := asyncio.create_task(self._group(task, group_size, prefix)))
                    self._groups.add(begun)
                if not under_way:
                    return
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    yield each.result()
                    under_way.discard(each)
                    self._groups.discard(each)
        finally:
            await _cancel(under_way)
            self._groups -= under_way

    async def _group(self, task: Task, group_size: int, prefix: str) -> Group:
        group_id = f"{prefix}{task.task_id}/{new_id()}"  # a task that comes again is another group
        async with asyncio.TaskGroup() as together:
            each = [together.create_task(self._one(task, group_id, index)) for index in range(group_size)]
        return Group(group_id, task, tuple(one.result() for one in each))

    async def _one(self, task: Task, group_id: str, sample_index: int) -> GroupRollout:
        """One rollout and its verdict."""
        job = self._harness.job(task.prompt)
        job.group_id, job.task_id, job.sample_index = group_id, task.task_id, sample_index
        job.timeout_s = task.timeout_s or self._timeout_s
        job.never_visible = [self._host.store]
        rollout = rollout_of(job)
        job.workdir = (self._keep or self._folder) / rollout.rollout_id
        scratch = self._folder / f"{rollout.rollout_id}-verdict"
        try:
            async with self._running:
                ran = await self._ran(job, task, rollout)
            if ran.exit_code is None or task.reward is None:
                return ran
            if ran.engine_failure:  # whatever it did then was not the policy's doing
                return await self._unjudged(ran, rollout, f"the engine failed: {ran.engine_failure}")
            async with self._judging:
                return await self._judged(ran, task, job.workdir, rollout, scratch)
        finally:
            gone = [scratch] if self._keep else [scratch, job.workdir]
            for path in gone:
                await asyncio.to_thread(workspace.remove, path)

    async def _ran(self, job: Job, task: Task, rollout: Rollout) -> GroupRollout:
        """A rollout without its verdict."""
        kept = job.workdir if self._keep else None
        try:
            await asyncio.to_thread(workspace.make, job.workdir, task.files)
            with captured(MAX_STDOUT_BYTES) as stdout, captured(_MAX_STDERR_BYTES) as stderr:
                job.stdout, job.stderr = stdout.fd, stderr.fd
                try:
                    outcome = await run_rollout(job, self._host, rollout)
                except SetupError as error:
                    raise SetupError(f"{error} {await stderr.text()}".strip()) from error
                return GroupRollout(
                    rollout_id=rollout.rollout_id,
                    sample_index=job.sample_index,
                    status=outcome.status,
                    stop_reason=rollout.stop_reason or "",
                    exit_code=outcome.exit_code,
                    no_reward="nobody judges this task",
                    incomplete=outcome.incomplete,
                    engine_failure=outcome.engine_failure,
                    calls=outcome.calls,
                    sampled_tokens=outcome.sampled_tokens,
                    seconds=outcome.seconds,
                    stdout=await stdout.text(),
                    stderr=await stderr.text(),
                    workspace=kept,
                )
        except Exception as error:  # whatever it is: the group goes on, and the record says what it was
            why = f"it did not start: {error or repr(error)}"
            await self._record_failed(rollout, why)
            return GroupRollout(
                rollout.rollout_id, job.sample_index, "failed", why, no_reward=why, workspace=kept
            )

    async def _record_failed(self, rollout: Rollout, why: str) -> None:
        rollout.status, rollout.stop_reason = "failed", why
        rollout.started_at = rollout.started_at or time.time()
        rollout.ended_at = rollout.ended_at or time.time()
        engine = self._host.interceptor.engine
        rollout.engine, rollout.model = engine.url, engine.model
        await asyncio.wrap_future(self._host.interceptor.recorder.rollout(rollout))

    async def _unjudged(self, ran: GroupRollout, rollout: Rollout, why: str) -> GroupRollout:
        rollout.stop_reason = f"{rollout.stop_reason}; no reward: {why}"
        await asyncio.wrap_future(self._host.interceptor.recorder.rollout(rollout))
        return replace(ran, no_reward=why, stop_reason=rollout.stop_reason)

    async def _judged(
        self, ran: GroupRollout, task: Task, workdir: Path, rollout: Rollout, scratch: Path
    ) -> GroupRollout:
        assert ran.exit_code is not None
        recorder = self._host.interceptor.recorder
        try:
            verdict = await judge(Attempt(task, workdir, ran.stdout, ran.exit_code, rollout.status), scratch)
        except NoVerdict as error:
            return await self._unjudged(ran, rollout, str(error))
        rows = _rows(verdict, rollout.rollout_id, verifier(task))
        durable = await asyncio.gather(*(asyncio.wrap_future(recorder.reward(row)) for row in rows))
        if not all(durable):
            return replace(ran, no_reward="it could not be recorded")
        return replace(ran, reward=verdict.value, no_reward=None, metrics=dict(verdict.metrics))


def _rows(verdict: Verdict, rollout_id: str, who: str) -> list[Reward]:
    figures = {REWARD: verdict.value, **{k: v for k, v in verdict.metrics.items() if k != REWARD}}
    now = time.time()
    return [
        Reward(rollout_id, name, value, who, verdict.evidence if name == REWARD else "", now)
        for name, value in figures.items()
    ]


async def _cancel(tasks: Iterable[asyncio.Task[Group]]) -> None:
    """End them in good order: their rollouts are recorded as interrupted when this returns."""
    tasks = [each for each in tasks if not each.done()]
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
