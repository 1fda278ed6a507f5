"""The loop of `polar-mitm rl`: rollouts, rewards, a step, new weights for the engine, and again.

    tasks --GroupRunner--> groups --store, reconstruct--> samples --Worker--> step --Sync--> engine

"on_policy" begins a step's groups when the engine has the last step's weights, and trains when all have
ended. "async" goes on beginning groups, as many as may be under way for the staleness that is allowed; what
turns out staler is masked, and counted. Position of a run: `iteration`, how often that went round (a round
without anything to learn is no optimiser step), and `groups`, how many tasks were taken.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from polar_mitm.cli.groups import Group, GroupRunner
from polar_mitm.cli.output import say
from polar_mitm.cli.rl_config import RlConfig
from polar_mitm.cli.rl_read import finished
from polar_mitm.cli.rl_sync import Sync
from polar_mitm.errors import EngineUnfit, SetupError
from polar_mitm.tasks import Task, load_tasks
from polar_mitm.types import EVALUATION
from polar_mitm_trainer.account import Account, NothingToLearn
from polar_mitm_trainer.fanout import samples_of
from polar_mitm_trainer.rundb import RunDB, step_rows

if TYPE_CHECKING:
    from polar_mitm.upstream.weights import Updated
    from polar_mitm_trainer.reporting import Board
    from polar_mitm_trainer.samples import Sample
    from polar_mitm_trainer.worker import Worker

T = TypeVar("T")


@dataclass
class Evaluation:
    """Rewards on tasks that are not trained on. `stderr` is over tasks; `unjudged` rollouts have none."""

    iteration: int
    policy_version: str
    reward: float
    stderr: float
    num_tasks: int
    unjudged: int


@dataclass
class History:
    """What a run has come to so far."""

    iteration: int = 0
    groups: int = 0
    version: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    saved: int | None = None
    """The version of the last checkpoint."""

    @property
    def policy_version(self) -> str:
        return f"step-{self.version}"


class RlLoop:
    """A run, from its `history` on; everything that it uses is open, and stays so."""

    def __init__(
        self,
        config: RlConfig,
        history: History,
        *,
        store: Path,
        runner: GroupRunner,
        worker: Worker,
        sync: Sync,
        db: RunDB,
        board: Board,
    ) -> None:
        self._config, self._history, self._store = config, history, store
        self._runner, self._worker, self._sync = runner, worker, sync
        self._db, self._board = db, board
        self._folder = config.out / "checkpoints"
        self._train = config.train
        self._served: int | None = None  # by the engine

    async def run(self) -> None:
        """Until the last step is done; leaves a checkpoint, also where it ends before.

        Raises:
            WeightsError: the engine refused an update.
            EngineUnfit: it answers no more.
            SetupError: the learner has ended, or refused a step; or nothing is judged.
            TaskError: the tasks cannot be made.
        """
        config, history = self._config, self._history
        try:
            await self._update()
            if config.evaluation.before and history.iteration == 0:
                await self._evaluate()
            async with aclosing(self._steps()) as steps:
                async for groups, seconds in steps:
                    await self._step(groups, seconds)
                    every = config.evaluation.every
                    if every and history.iteration % every == 0 and history.iteration < config.steps:
                        await self._evaluate()
            if config.evaluation.after:
                await self._evaluate()
        finally:
            await _whole(self._leave())

    # --- rollouts -----------------------------------------------------------------------------------

    async def _steps(self) -> AsyncGenerator[tuple[list[Group], float], None]:
        """The groups of each step to come, and how long they were waited for."""
        config, history = self._config, self._history
        per_step, size = config.rollouts.groups_per_step, config.rollouts.group_size
        tasks = islice(self._tasks(), history.groups, None)
        if config.sync.mode == "on_policy":
            while history.iteration < config.steps:
                began = time.monotonic()
                run = self._runner.run(islice(tasks, per_step), size, max_groups=per_step)
                async with aclosing(run) as groups:
                    taken = [group async for group in groups]
                yield taken, time.monotonic() - began
            return
        first, ahead = history.iteration, 1 + config.sync.max_staleness
        source = _Rationed(tasks, lambda: (min(history.iteration + ahead, config.steps) - first) * per_step)
        run = self._runner.run(source, size, max_groups=ahead * per_step)
        async with aclosing(run) as groups:
            while history.iteration < config.steps:
                began, taken = time.monotonic(), []
                async for group in groups:
                    taken.append(group)
                    if len(taken) == per_step:
                        break
                yield taken, time.monotonic() - began

    def _tasks(self) -> Iterator[Task]:
        """Without end: a source that ends begins again, with another seed."""
        told, seed = self._config.rollouts, self._config.seed
        while True:
            yield from load_tasks(told.tasks, told.split, seed)
            seed += 1

    # --- a step -------------------------------------------------------------------------------------

    async def _step(self, groups: Sequence[Group], rollout_s: float) -> None:
        """Learn from groups, and bring the engine to the new weights."""
        rollouts = [each for group in groups for each in group.rollouts]
        rewards = [each.reward for each in rollouts if each.reward is not None]
        failed = next((each.engine_failure for each in rollouts if each.engine_failure), None)
        if failed and not rewards:
            raise EngineUnfit(f"the engine answered no rollout of a whole step to its end: {failed}")
        if not rewards:
            why = next((each.no_reward for each in rollouts), "there are none")
            raise SetupError(f"no rollout of a whole step was judged: {why}")
        if not any(each.sampled_tokens for each in rollouts):
            raise EngineUnfit("the engine answered no rollout of a whole step; its log may say why")
        history, began = self._history, time.monotonic()
        metrics = {"reward/mean": fmean(rewards), "time/rollouts": rollout_s}
        samples, account = await _whole(self._learn(groups, metrics))
        learned = time.monotonic()
        try:
            if samples and history.version % self._config.sync.every == 0:
                updated = await self._update(samples)
                if updated.difference is not None:
                    metrics["sync/difference"] = updated.difference
        finally:  # a step that the engine did not get was a step all the same
            metrics |= {"time/train": learned - began, "time/sync": time.monotonic() - learned}
            begun_at = time.time() - rollout_s - (time.monotonic() - began)
            await _whole(asyncio.to_thread(self._record, samples, metrics, begun_at))
        say(self._line(metrics, account, len(groups)))
        every = self._config.checkpoint.every
        if every and history.iteration % every == 0:
            await _whole(self._save())

    async def _learn(
        self, groups: Sequence[Group], metrics: dict[str, float]
    ) -> tuple[list[Sample], Account]:
        """An optimiser step, unless there is nothing to learn; what it was given."""
        history = self._history
        rollouts = await asyncio.to_thread(finished, self._store, groups, self._config.rollouts.builder)
        samples: list[Sample] = []
        try:
            samples, account = samples_of(rollouts, self._train, current_step=history.version)
        except NothingToLearn as error:
            account = error.account
        metrics |= account.metrics()
        metrics["reward/with_signal"] = account.groups["trained"] / len(groups)
        if samples:
            found = await asyncio.to_thread(self._worker.step, samples)
            metrics |= {f"train/{name}": value for name, value in found.items()}
            history.version += 1
        history.iteration += 1
        history.groups += len(groups)
        return samples, account

    async def _update(self, samples: Sequence[Sample] = ()) -> Updated:
        """The newest weights into the engine."""
        updated = await self._sync.update(self._history.policy_version, samples)
        self._served = self._history.version
        return updated

    def _record(self, samples: list[Sample], metrics: dict[str, float], begun_at: float) -> None:
        history = self._history
        self._db.step(
            history.iteration,
            step_rows(samples),
            metrics,
            policy_version=history.policy_version,
            started_at=begun_at,
        )
        self._board.add(history.iteration, metrics)

    def _line(self, metrics: dict[str, float], account: Account, num_groups: int) -> str:
        mismatch = metrics.get("train/mismatch_abs")
        return (
            f"step {self._history.iteration}/{self._config.steps}  reward {metrics['reward/mean']:.3f}  "
            f"signal {account.groups['trained']}/{num_groups} groups  {account.trained:,} tokens  "
            f"rollouts {metrics['time/rollouts']:.1f} s  train {metrics['time/train']:.1f} s  "
            f"sync {metrics['time/sync']:.1f} s"
            + ("  nothing to learn" if mismatch is None else f"  mismatch {mismatch:.2g}")
        )

    # --- what is not learned from -------------------------------------------------------------------

    async def _evaluate(self) -> None:
        told, history = self._config.evaluation, self._history
        if not told.num_tasks:
            return
        if self._served != history.version:  # sync.every left it behind
            await self._update()
        tasks = islice(load_tasks(self._config.rollouts.tasks, told.split, self._config.seed), told.num_tasks)
        means: list[float] = []
        unjudged = 0
        async with aclosing(self._runner.run(tasks, told.samples, prefix=EVALUATION)) as groups:
            async for group in groups:
                unjudged += len(group.rollouts) - len(group.rewards)
                if group.rewards:
                    means.append(fmean(group.rewards))
        if not means:
            raise SetupError(
                "no rollout of the evaluation was judged: `polar-mitm collect` on its tasks shows why"
            )
        mean = fmean(means)
        variance = sum((each - mean) ** 2 for each in means) / max(len(means) - 1, 1)
        stderr = math.sqrt(variance / len(means))
        result = Evaluation(history.iteration, history.policy_version, mean, stderr, len(means), unjudged)
        history.evaluations.append(result)
        figures = {"evaluation/reward": mean, "evaluation/stderr": stderr, "evaluation/unjudged": unjudged}
        self._db.metrics(history.iteration, figures)
        self._board.add(history.iteration, figures)
        say(
            f"held out, after {history.iteration} steps: reward {mean:.3f} +- {stderr:.3f} "
            f"on {len(means)} tasks",
            style="bold",
        )

    async def _save(self) -> None:
        history = self._history
        if history.saved == history.version:
            return
        position: dict[str, Any] = {"iteration": history.iteration, "groups": history.groups}
        folder = self._folder / history.policy_version
        keep = self._config.checkpoint.keep_last
        await asyncio.to_thread(self._worker.save, folder, position, keep)
        history.saved = history.version

    async def _leave(self) -> None:
        """The last checkpoint. A learner that has ended leaves the one before."""
        try:
            await self._save()
        except SetupError as error:
            say(f"no last checkpoint: {str(error).splitlines()[0]}", style="yellow")


class _Rationed(Iterator[Task]):
    """Tasks, as long as fewer than `allowed()` were given: none for now, then more, as that rises.

    A group that is begun under the weights of step n is then one of the first (n + 1 + staleness) steps'.
    """

    def __init__(self, tasks: Iterator[Task], allowed: Callable[[], int]) -> None:
        self._tasks, self._allowed, self._num_given = tasks, allowed, 0

    def __next__(self) -> Task:
        if self._num_given >= self._allowed():
            raise StopIteration
        self._num_given += 1
        return next(self._tasks)


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Do `work` to its end, also where this task is cancelled meanwhile; again, and it is cut off."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            say("stopping once this is done; again to stop at once", style="yellow")
        await task
        raise
