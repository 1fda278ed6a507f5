"""A training set, step by step: whole groups, in an order that seed and epoch decide. No torch here.

with open_reader(store) as reader:
    snapshot = select(reader, resolve_query("all"), policy=policy_of(folder))
    training_set = TrainingSet(reader, snapshot, config, groups_per_step=8)
    for step in training_set.steps(Position()):
        samples, account = samples_of(step.rollouts, config)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from polar_mitm.store import StoreReader
from polar_mitm_trainer.account import Account, DataError, NothingToLearn
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.fanout import samples_of
from polar_mitm_trainer.finished import Finished, Outcome
from polar_mitm_trainer.listing import Listed, Listing, unbuilt
from polar_mitm_trainer.selection import Policy, resolve_query, select, verify
from polar_mitm_trainer.shaping import Judge, by_group, judge, leave_out
from polar_mitm_trainer.snapshot import Snapshot, digest_of

__all__ = [
    "Account",
    "DataError",
    "Finished",
    "NothingToLearn",
    "Outcome",
    "Policy",
    "Position",
    "Snapshot",
    "Step",
    "TrainingSet",
    "resolve_query",
    "samples_of",
    "select",
    "unbuilt",
    "verify",
]


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where in a training set: the step to come, counted in its epoch."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The rollouts of some whole groups. `after` is where to go on."""

    rollouts: tuple[Finished, ...]
    position: Position
    after: Position


class TrainingSet:
    """The steps of a snapshot. Groups that have nothing to teach are in none; `set_aside` is their account.

    Args:
        reader: the store that the snapshot is of, open; its tokens are read a step at a time, and compared
            with the snapshot as they are.
        snapshot: of `select`, or of an earlier run after `verify`.
        config: its seed decides the order, its advantages and losses which groups can teach.
        groups_per_step: the last step of an epoch may have fewer.
        judge: decides it instead.

    Raises:
        NothingToLearn: no group can teach anything.
        StoreError: the store cannot be read, or the snapshot is not of it.
    """

    def __init__(
        self,
        reader: StoreReader,
        snapshot: Snapshot,
        config: TrainConfig,
        *,
        groups_per_step: int,
        judge: Judge = judge,
    ) -> None:
        if groups_per_step < 1:
            raise ValueError(f"groups_per_step={groups_per_step}")
        self._reader, self._seed, self._per_step = reader, config.seed, groups_per_step
        self._listing = Listing(reader, snapshot.builder)
        self._digests = {row.trajectory_id: row.digest for row in snapshot.rows}
        if gone := [t for t in self._digests if t not in self._listing]:
            raise DataError(
                f"{len(gone)} trajectories of the snapshot are not in the store (first {gone[0]})"
            )
        self._trajectories: dict[str, list[Listed]] = {}
        outcomes = {}
        for row in snapshot.rows:
            self._trajectories.setdefault(row.rollout_id, []).append(self._listing[row.trajectory_id])
            outcomes[row.rollout_id] = self._listing.outcome(row.rollout_id, row.reward, row.group_id)
        for each in snapshot.bystanders:
            outcomes[each.rollout_id] = self._listing.outcome(each.rollout_id, each.reward, each.group_id)
        rollouts = list(outcomes.values())
        verdicts, account = judge(rollouts, config)
        self._groups: dict[str, list[Outcome]] = {}
        self.set_aside = Account()
        for group, places in by_group(rollouts).items():
            if any(
                verdicts[p].left_out is None and self._trajectories.get(rollouts[p].rollout_id)
                for p in places
            ):
                self._groups[group] = sorted((rollouts[p] for p in places), key=lambda o: o.rollout_id)
                continue
            for place in places:
                leave_out(rollouts[place], verdicts[place].left_out or "nothing_sampled", self.set_aside)
        self.set_aside.groups = account.groups.copy()
        del self.set_aside.groups["trained"]
        if not self._groups:
            raise NothingToLearn(account)

    @property
    def num_groups(self) -> int:
        """How many groups an epoch goes over."""
        return len(self._groups)

    @property
    def steps_per_epoch(self) -> int:
        """How many steps an epoch has."""
        return -(-len(self._groups) // self._per_step)

    def order(self, epoch: int) -> list[str]:
        """The groups in the order of an epoch, which is the same with any library on any machine."""

        def place(group: str) -> bytes:
            return hashlib.sha256(f"{self._seed}/{epoch}/{group}".encode()).digest()

        return sorted(self._groups, key=place)

    def steps(self, start: Position = Position(), *, num_epochs: int | None = 1) -> Iterator[Step]:
        """The steps from `start` to the end of epoch number `num_epochs` (None: without end).

        Raises:
            DataError: a trajectory is no longer what the snapshot says.
            StoreError: the store cannot be read.
        """
        epoch, at = start.epoch, start.step
        while num_epochs is None or epoch < num_epochs:
            order = self.order(epoch)
            for step in range(at, self.steps_per_epoch):
                groups = order[step * self._per_step : (step + 1) * self._per_step]
                last = step + 1 == self.steps_per_epoch
                after = Position(epoch + 1, 0) if last else Position(epoch, step + 1)
                yield Step(self._read(groups), Position(epoch, step), after)
            epoch, at = epoch + 1, 0

    def _read(self, groups: list[str]) -> tuple[Finished, ...]:
        outcomes = [outcome for group in groups for outcome in self._groups[group]]
        chosen = [listed for o in outcomes for listed in self._trajectories.get(o.rollout_id, [])]
        found = {listed.trajectory_id: trajectory for listed, trajectory in self._listing.read(chosen)}
        if changed := [t for t, each in found.items() if digest_of(each) != self._digests[t]]:
            raise DataError(
                f"{len(changed)} trajectories are not what the snapshot says (first {changed[0]})"
            )
        answers = self._reader.answers([outcome.rollout_id for outcome in outcomes])
        return tuple(
            Finished.of(
                o, [found[t.trajectory_id] for t in self._trajectories.get(o.rollout_id, [])], answers
            )
            for o in outcomes
        )
