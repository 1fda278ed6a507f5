"""What pins a training set: an id that only the same rows have, on any machine. No torch here."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from polar_mitm.types import RolloutStatus
from polar_mitm_trainer.account import DataError
from polar_mitm_trainer.finished import TrajectoryArrays


class Row(msgspec.Struct, frozen=True):
    """A trajectory of a training set, its `digest_of`, and what decides its rollout's advantage."""

    trajectory_id: str
    rollout_id: str
    group_id: str
    reward: float | None
    status: RolloutStatus
    digest: str


class Bystander(msgspec.Struct, frozen=True):
    """A judged rollout in which nothing trains: its reward is in the mean of its group all the same."""

    rollout_id: str
    group_id: str
    reward: float
    status: RolloutStatus


class Snapshot(msgspec.Struct, frozen=True):
    """A training set: how it was asked for, and what that gave.

    `rows` are in the order of their ids. `refused` counts the trajectories that were selected, but kept out,
    by reason; `left_out` what of the store cannot be selected at all, in rollouts or sampled tokens.
    `bystanders` are in the order of their ids; `model` is the name that the engine served, where it told.
    """

    snapshot_id: str
    query: str
    builder: str
    reward_name: str | None
    rows: tuple[Row, ...]
    refused: dict[str, int] = {}
    bystanders: tuple[Bystander, ...] = ()
    left_out: dict[str, int] = {}
    model: str | None = None

    @classmethod
    def of(
        cls,
        rows: Iterable[Row],
        *,
        query: str,
        builder: str,
        reward_name: str | None = None,
        refused: dict[str, int] | None = None,
        bystanders: Iterable[Bystander] = (),
        left_out: dict[str, int] | None = None,
        model: str | None = None,
    ) -> Snapshot:
        """Its id is SHA-256 of the rows and bystanders, whatever order they come in, and of nothing else."""
        ordered = tuple(sorted(rows, key=lambda row: row.trajectory_id))
        beside = tuple(sorted(bystanders, key=lambda each: each.rollout_id))
        digest = hashlib.sha256()
        for row in (*ordered, *beside):
            digest.update(msgspec.json.encode(msgspec.structs.astuple(row)) + b"\n")
        return cls(
            digest.hexdigest(),
            query,
            builder,
            reward_name,
            ordered,
            refused or {},
            beside,
            left_out or {},
            model,
        )

    def save(self, path: Path) -> None:
        """Write it down as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            DataError: the file is none, or its rows are not those of its id.
        """
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise DataError(f"{path} is no snapshot: {error}") from error
        again = cls.of(found.rows, query=found.query, builder=found.builder, bystanders=found.bystanders)
        if again.snapshot_id != found.snapshot_id:
            raise DataError(f"{path} is damaged: its rows are not those of snapshot {found.snapshot_id}")
        return found

    def check(self, now: Snapshot) -> None:
        """Compare with the rows that the same question gives now; rows that are new there do not matter.

        Raises:
            DataError: a row is gone or differs, with the count of each.
        """
        found: dict[str, Row | Bystander] = {row.trajectory_id: row for row in now.rows}
        found |= {each.rollout_id: each for each in now.bystanders}
        known: dict[str, Row | Bystander] = {row.trajectory_id: row for row in self.rows}
        known |= {each.rollout_id: each for each in self.bystanders}
        why: Counter[str] = Counter()
        example = ""
        for name_of, row in known.items():
            other = found.get(name_of)
            if type(other) is not type(row):
                differs = ["gone"]
            else:
                differs = [
                    f"another {name}"
                    for name, mine, theirs in zip(
                        row.__struct_fields__,
                        msgspec.structs.astuple(row),
                        msgspec.structs.astuple(other),
                        strict=True,
                    )
                    if mine != theirs
                ]
            why.update(differs)
            example = example or (differs and name_of) or ""
        if why:
            reasons = [f"{n} {reason}" for reason, n in why.items()]
            if now.refused:
                reasons.append("refused now: " + ", ".join(f"{n} {r}" for r, n in now.refused.items()))
            raise DataError(
                f"the store no longer holds snapshot {self.snapshot_id[:12]} of {len(self.rows)} "
                f"trajectories: {'; '.join(reasons)} (first {example})"
            )


def digest_of(trajectory: TrajectoryArrays) -> str:
    """SHA-256 of tokens, mask and logprobs, and of where calls that train lie and by which weights."""
    spans = [
        (s.call_id, s.sampled_start, s.end, s.truncated, s.policy_version, s.policy_version_last)
        for s in trajectory.spans
        if s.mask_reason is None
    ]
    digest = hashlib.sha256(msgspec.json.encode((trajectory.token_ids.size, spans)))
    for array, kind in (
        (trajectory.token_ids, "<i4"),
        (trajectory.loss_mask, "u1"),
        (trajectory.behaviour_logprobs, "<f4"),
    ):
        digest.update(np.ascontiguousarray(array, kind).data)
    return digest.hexdigest()
