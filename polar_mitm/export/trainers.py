"""Trajectories as rows of other trainers' token-level records, in Parquet (`datasets.Dataset.from_parquet`).

`TRL` has what a `rollout_func` of TRL's GRPOTrainer returns for a sample, under its names (TRL 1.x,
"Custom rollout functions": prompt_ids, completion_ids, logprobs, env_mask), and the reward. `VERL` has the
fields of verl's `AgentLoopOutput` (verl 0.6, "Agent Loop"), and the group as `uid`. In both the prompt ends
where the first trained token begins, and nothing is padded: both trainers pad as they collate.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from polar_mitm.export.parquet import IDS, LOGPROBS, column, write
from polar_mitm.reconstruct import Trajectory

_MASK = pa.list_(pa.uint8())
_WHOSE = [
    column("trajectory_id", pa.string()),
    column("rollout_id", pa.string()),
    column("policy_version", pa.string(), "the oldest that sampled a trained token"),
]
TRL = pa.schema(
    [
        column("prompt_ids", IDS, "[P] up to the first trained token"),
        column("completion_ids", IDS, "[C] what was sampled, and what the environment said in between"),
        column("logprobs", LOGPROBS, "[C] nats, the engine's; 0.0 where env_mask is 0"),
        column("env_mask", _MASK, "[C] 1 where a sampled token trains"),
        column("reward", pa.float64(), "of the rollout: the same for each of its trajectories"),
        column("group_id", pa.string(), "the rollouts of one prompt: advantages are relative to these"),
        *_WHOSE,
    ],
    metadata={"polar_mitm.schema": "trl/1"},
)
VERL = pa.schema(
    [
        column("prompt_ids", IDS, "[P] up to the first trained token"),
        column("response_ids", IDS, "[R] what was sampled, and what the environment said in between"),
        column("response_mask", _MASK, "[R] 1 where a sampled token trains"),
        column("response_logprobs", LOGPROBS, "[R] nats, the engine's (rollout_log_probs)"),
        column("reward_score", pa.float64(), "of the rollout: the same for each of its trajectories"),
        column("num_turns", pa.int32(), "calls in the trajectory"),
        column("uid", pa.string(), "group: advantages are relative to the rows with the same one"),
        column("data_source", pa.string(), "polar-mitm"),
        *_WHOSE,
    ],
    metadata={"polar_mitm.schema": "verl/1"},
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A trajectory and its rollout's reward."""

    trajectory: Trajectory
    reward: float

    @property
    def group_id(self) -> str:
        """A rollout without a group is one of its own."""
        return self.trajectory.group_id or self.trajectory.rollout_id


def export_trl(items: Iterable[Judged], path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Write trajectories, each with a token that trains, in the schema `TRL`; return how many.

    Raises:
        FileExistsError, OSError: as `export_trajectories`.
    """
    return write(items, _trl_row, TRL, Path(path), force)


def export_verl(items: Iterable[Judged], path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Write trajectories, each with a token that trains, in the schema `VERL`; return how many.

    Raises:
        FileExistsError, OSError: as `export_trajectories`.
    """
    return write(items, _verl_row, VERL, Path(path), force)


def _trl_row(item: Judged) -> Mapping[str, Any]:
    prompt, answer, mask, logprobs = _cut(item.trajectory)
    return {
        "prompt_ids": prompt,
        "completion_ids": answer,
        "logprobs": logprobs,
        "env_mask": mask,
        "reward": item.reward,
        "group_id": item.group_id,
        **_whose(item.trajectory),
    }


def _verl_row(item: Judged) -> Mapping[str, Any]:
    prompt, answer, mask, logprobs = _cut(item.trajectory)
    return {
        "prompt_ids": prompt,
        "response_ids": answer,
        "response_mask": mask,
        "response_logprobs": logprobs,
        "reward_score": item.reward,
        "num_turns": len(item.trajectory.spans),
        "uid": item.group_id,
        "data_source": "polar-mitm",
        **_whose(item.trajectory),
    }


def _cut(trajectory: Trajectory) -> tuple[Any, Any, Any, Any]:
    """Prompt [P], and of the rest, up to the last trained token: ids, loss mask and logprobs [C]."""
    trained = np.flatnonzero(trajectory.loss_mask)
    start, end = int(trained[0]), int(trained[-1]) + 1
    rest = slice(start, end)
    return (
        trajectory.token_ids[:start],
        trajectory.token_ids[rest],
        trajectory.loss_mask[rest],
        trajectory.behaviour_logprobs[rest],
    )


def _whose(trajectory: Trajectory) -> dict[str, str | None]:
    return {
        "trajectory_id": trajectory.trajectory_id,
        "rollout_id": trajectory.rollout_id,
        "policy_version": trajectory.policy_version_min,
    }
