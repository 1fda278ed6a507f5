"""A batch job: a recorded store in, a trained policy out, the same to the bit every time.

    OUT/ run.duckdb metrics.jsonl reward.png tensorboard/ snapshot.json checkpoints/step-N/

`snapshot.json` pins the training set: who resumes gets its rows, or is told that the store has others. On
several ranks every one reads the store, and the first one writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from polar_mitm.dialects.ids import new_id
from polar_mitm.store import open_reader
from polar_mitm_trainer import checkpoint, reporting
from polar_mitm_trainer.account import Account, DataError, NothingToLearn
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.data import Position, Snapshot, TrainingSet, resolve_query, samples_of, select, verify
from polar_mitm_trainer.distributed import Distributed
from polar_mitm_trainer.identity import policy_of
from polar_mitm_trainer.learner import Learner
from polar_mitm_trainer.policy import refuse_adapter
from polar_mitm_trainer.rundb import RunDB, differences, step_rows
from polar_mitm_trainer.sft import accepting
from polar_mitm_trainer.shaping import Judge, judge

_FREE = ("num_steps", "num_epochs", "checkpoint_every", "keep_last")  # to change when a run is resumed
_ELSEWHERE = ("kind", "store", "query", "out", "config", "resume")  # recorded, or no option of the run


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """What to train on, how long, and where to.

    Attributes:
        kind: "train" or "sft", for the record.
        query: as `resolve_query` takes it; `reward_name` and `skip_refused` are those of `select`.
        served_as: the model's name at the engine; trajectories of another one are refused.
        min_reward: what a rollout must have earned to be accepted (`accepting`); None is GRPO's judge.
        num_steps: optimiser steps in all, those before a resume included; None: `num_epochs` decides.
        checkpoint_every: steps; 0 is only the last one.
        resume: go on with what is in `out`; only how long, where it is saved and on which device may differ.
            What is None is then as it was recorded.
    """

    kind: str
    store: Path
    query: str
    out: Path
    config: TrainConfig
    builder: str = "forest"
    reward_name: str | None = None
    skip_refused: bool = False
    served_as: str | None = None
    min_reward: float | None = None
    groups_per_step: int = 8
    num_steps: int | None = None
    num_epochs: int = 1
    checkpoint_every: int = 10
    keep_last: int = 2
    resume: bool = False

    @property
    def judge(self) -> Judge:
        """Of rollouts."""
        return judge if self.min_reward is None else accepting(self.min_reward)

    def record(self) -> dict[str, Any]:
        """All that decides what a step does, as JSON takes it, for `runs.config`."""
        own = {name: value for name, value in vars(self).items() if name not in (*_FREE, *_ELSEWHERE)}
        told: dict[str, Any] = json.loads(json.dumps(own, default=str))
        return {**self.config.model_dump(mode="json"), "job": told}


@dataclass(frozen=True)
class StepDone:
    """A step that is done: its number, of how many if that is known, and its figures."""

    step: int
    num_steps: int | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """What a job came to. `steps` are optimiser steps; `skipped` had nothing to teach after all.

    `refused`, `left_out` and `model` are the snapshot's.
    """

    run_id: str
    snapshot_id: str
    num_trajectories: int
    num_groups: int
    set_aside: str
    refused: dict[str, int]
    left_out: dict[str, int]
    model: str | None
    steps: int
    skipped: int
    stopped: bool
    checkpoint: Path
    metrics: dict[str, float]


class BatchRun:
    """A job under way. `run` does it; `stop`, from anywhere, ends it after the step that is being done.

    Raises:
        DataError, StoreError: nothing can be trained on, or not resumed.
        PolicyError: no such policy, or none that can be trained.
    """

    def __init__(self, job: BatchJob, distributed: Distributed | None = None) -> None:
        self._job = job
        self._distributed = distributed or Distributed()
        self._first = self._distributed.rank == 0
        self._stop = False

    def stop(self) -> None:
        """End in good order, with a checkpoint."""
        self._stop = True

    def run(self, on_step: Callable[[StepDone], None] = lambda done: None) -> Summary:
        """Train; leaves a checkpoint, also where it fails on the way.

        Raises:
            BadStepError: a step that was refused; the checkpoint is of the one before.
        """
        disable_progress_bar()  # those of loading and saving; ours is `on_step`
        job = self._job
        if job.out.exists() and not job.out.is_dir():
            raise DataError(f"{job.out} is a file, and a run takes a folder")
        refuse_adapter(job.config.policy.model)
        with open_reader(job.store) as reader:
            snapshot = self._snapshot(reader)
            training_set = TrainingSet(
                reader, snapshot, job.config, groups_per_step=job.groups_per_step, judge=job.judge
            )
            learner = Learner(job.config, distributed=self._distributed)
            position = Position()
            if job.resume:
                position = self._resumed(learner)
            with self._recorded(learner, snapshot) as (db, board):
                return self._steps(learner, training_set, snapshot, position, db, board, on_step)

    def _snapshot(self, reader: Any) -> Snapshot:
        job, path = self._job, self._job.out / "snapshot.json"
        if job.resume:
            snapshot = Snapshot.load(path)
            query = resolve_query(job.query, builder=job.builder)
            if (snapshot.query, snapshot.builder) != (query, job.builder):
                raise DataError(
                    f"{job.out} was trained on another query ({snapshot.builder}): {snapshot.query}"
                )
            if job.served_as not in (None, snapshot.model):
                raise DataError(f"{job.out} was trained on what {snapshot.model!r} sampled")
            self._run_id, self._record = self._recorded_as()
            verify(reader, snapshot)
            return snapshot
        if (job.out / "run.duckdb").exists():
            raise DataError(
                f"{job.out} holds a run already: --resume goes on with it, or name another folder"
            )
        snapshot = select(
            reader,
            resolve_query(job.query, builder=job.builder),
            builder=job.builder,
            reward_name=job.reward_name,
            policy=policy_of(job.config.policy.model, served_as=job.served_as),
            skip_refused=job.skip_refused,
        )
        self._run_id, self._record = self._recorded_as()
        self._distributed.gather(None)  # everybody has seen that there is no run yet
        return snapshot

    def _recorded_as(self) -> tuple[str, dict[str, Any]]:
        """The run's id and what is recorded of its options; raises DataError where a resume changes them."""
        job, now = self._job, self._job.record()
        if not job.resume:
            return new_id(), now
        run_id, kind, then = RunDB.recorded(job.out)
        left_out = [name for name, value in now["job"].items() if value is None]
        now["job"] |= {name: then.get("job", {}).get(name) for name in left_out}
        found = differences({"kind": kind, **then}, {"kind": job.kind, **now})
        if found := [each for each in found if not each.startswith("policy.device:")]:
            raise DataError(
                f"{job.out} was begun with other options ({'; '.join(found)}): give those that it was begun "
                "with again, all but steps, epochs, checkpoints and the device; or name another folder"
            )
        self._distributed.gather(None)  # everybody has read it
        return run_id, now

    def _resumed(self, learner: Learner) -> Position:
        folder = checkpoint.latest(self._job.out / "checkpoints")
        return Position() if folder is None else Position(**learner.resume(folder))

    @contextmanager
    def _recorded(
        self, learner: Learner, snapshot: Snapshot
    ) -> Iterator[tuple[RunDB | None, reporting.Board | None]]:
        """The run's database and board, on the first rank; how it ended is in them afterwards."""
        if not self._first:
            yield None, None
            return
        job = self._job
        if not job.resume:
            try:
                job.out.mkdir(parents=True, exist_ok=True)
                snapshot.save(job.out / "snapshot.json")
            except OSError as error:
                raise DataError(f"{job.out} cannot be written to: {error.strerror}") from error
        db = RunDB(job.out, self._run_id)
        db.begin(job.kind, job.out.name, self._record, job.store)
        db.snapshot(
            snapshot.snapshot_id,
            snapshot.query,
            job.store,
            [(row.trajectory_id, row.rollout_id) for row in snapshot.rows],
        )
        db.rewind(learner.version)
        board = reporting.Board(job.out / "tensorboard")
        status = "failed"
        try:
            yield db, board
            status = "stopped" if self._stop else "done"
        finally:
            board.close()
            db.end(status)
            curves = {"training": db.series("reward/mean")}
            reporting.draw(job.out / "reward.png", curves, title=job.out.name)

    def _steps(
        self,
        learner: Learner,
        training_set: TrainingSet,
        snapshot: Snapshot,
        position: Position,
        db: RunDB | None,
        board: reporting.Board | None,
        on_step: Callable[[StepDone], None],
    ) -> Summary:
        job, skipped, in_a_row = self._job, 0, 0
        folder = job.out / "checkpoints"
        total = job.num_steps
        if total is None:
            total = job.num_epochs * training_set.steps_per_epoch
        metrics: dict[str, float] = {}
        saved = learner.version if job.resume else -1
        try:
            for step in training_set.steps(position, num_epochs=None if job.num_steps else job.num_epochs):
                if learner.version >= total or self._stopped():
                    break
                begun_at, clock = time.time(), time.monotonic()
                try:
                    samples, account = samples_of(step.rollouts, job.config, judge=job.judge)
                except NothingToLearn:
                    skipped, in_a_row, position = skipped + 1, in_a_row + 1, step.after
                    if in_a_row == training_set.steps_per_epoch:
                        raise  # neither will the next epoch teach anything
                    continue
                in_a_row = 0
                found = learner.step(samples)
                position = step.after
                rewards = [r.outcome.reward for r in step.rollouts if r.outcome.reward is not None]
                metrics = {
                    "reward/mean": sum(rewards) / len(rewards),
                    "time/step": time.monotonic() - clock,
                    **account.metrics(),
                    **{name if "/" in name else f"train/{name}": value for name, value in found.items()},
                }
                if db and board:
                    db.step(
                        learner.version,
                        step_rows(samples),
                        metrics,
                        policy_version=learner.policy_version,
                        started_at=begun_at,
                        snapshot_id=snapshot.snapshot_id,
                    )
                    board.add(learner.version, metrics)
                    on_step(StepDone(learner.version, total, metrics))
                if job.checkpoint_every and learner.version % job.checkpoint_every == 0:
                    saved = self._save(learner, folder, position)
        finally:
            if saved != learner.version:
                self._save(learner, folder, position)
        return Summary(
            run_id=db.run_id if db else "",
            snapshot_id=snapshot.snapshot_id,
            num_trajectories=len(snapshot.rows),
            num_groups=training_set.num_groups,
            set_aside=_told(training_set.set_aside),
            refused=snapshot.refused,
            left_out=snapshot.left_out,
            model=snapshot.model,
            steps=learner.version,
            skipped=skipped,
            stopped=self._stop,
            checkpoint=folder / learner.policy_version,
            metrics=metrics,
        )

    def _stopped(self) -> bool:
        """Whether anybody was told to stop: ranks end after the same step."""
        self._stop = any(self._distributed.gather(self._stop))
        return self._stop

    def _save(self, learner: Learner, folder: Path, position: Position) -> int:
        learner.save(folder / learner.policy_version, asdict(position))
        if self._first:
            checkpoint.prune(folder, self._job.keep_last)
        return learner.version


def _told(account: Account) -> str:
    return account.told() if account.rollouts else ""
