"""Groups that have ended, out of the store that is being recorded: what the learner gets of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polar_mitm.cli.groups import Group
from polar_mitm.reconstruct.records import Builder
from polar_mitm.store import open_reader
from polar_mitm.store.columns import each_rollout
from polar_mitm.store.rows import quote
from polar_mitm.types import Rollout
from polar_mitm_trainer.finished import Finished


def finished(store: Path, groups: Sequence[Group], builder: Builder) -> list[Finished]:
    """All their rollouts that are in the store, rebuilt.

    Raises:
        StoreError: the store cannot be read.
    """
    rewards = {each.rollout_id: each.reward for group in groups for each in group.rollouts}
    found: list[Finished] = []
    with open_reader(store) as reader:
        listed = ", ".join(map(quote, rewards))
        rows = reader.sql(f"FROM rollouts WHERE rollout_id IN ({listed})").to_pylist()
        rollouts = {row["rollout_id"]: Rollout(**row) for row in rows}
        answers = reader.answers(list(rollouts))
        for rollout_id, columns in zip(rollouts, each_rollout(reader, list(rollouts)), strict=True):
            found.append(
                Finished.of_calls(
                    rollouts[rollout_id], columns, answers, reward=rewards[rollout_id], builder=builder
                )
            )
    return found
