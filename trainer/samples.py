"""What the optimiser is given: trajectories with an advantage for each of their tokens. No torch here.

T tokens of one trajectory, S samples of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Aggregation = Literal["token", "sequence", "rollout", "constant"]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One trajectory as an optimiser step takes it.

    `token_ids` [T] int32; `loss_mask` [T] uint8, 1 where a sampled token trains; `behaviour_logprobs` [T]
    float32 in nats, the engine's, 0.0 where masked; `advantages` [T] float32, 0.0 where masked: its
    rollout's advantage, or another one where a single call was judged. `weights` [T] float32 is what a
    token's loss is multiplied by before losses are summed over the whole step (`weigh` decides it).
    """

    trajectory_id: str
    rollout_id: str
    group_id: str
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    behaviour_logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    weights: NDArray[np.float32]
    policy_version: str | None = None

    @property
    def num_trained(self) -> int:
        """How many tokens train."""
        return int(self.loss_mask.sum())


def weigh(samples: Sequence[Sample], how: Aggregation, *, constant: float | None = None) -> list[Sample]:
    """The samples of one whole step with the weights of an aggregation, so that losses are just summed.

    "token": every trained token of the step weighs the same (DAPO, arXiv 2503.14476). "sequence": every
    trajectory does, its tokens share. "rollout": every rollout does, so that a session that splits into ten
    trajectories does not weigh ten; with one trajectory each that is GRPO's (arXiv 2402.03300).
    "constant": a token weighs 1 / (`constant` x number of rollouts), whatever the lengths (Dr. GRPO, arXiv
    2503.20783).

    Raises:
        ValueError: "constant" without a positive constant.
    """
    if how == "constant" and not (constant and constant > 0):
        raise ValueError("aggregation 'constant' needs the length to divide by")
    by_rollout: dict[str, int] = {}
    for each in samples:
        by_rollout[each.rollout_id] = by_rollout.get(each.rollout_id, 0) + each.num_trained
    num_tokens = sum(by_rollout.values())
    num_sequences = sum(each.num_trained > 0 for each in samples)
    num_rollouts = sum(n > 0 for n in by_rollout.values())

    def weight(sample: Sample) -> float:
        if how == "token":
            return 1.0 / num_tokens
        if how == "sequence":
            return 1.0 / (sample.num_trained * num_sequences)
        if how == "rollout":
            return 1.0 / (by_rollout[sample.rollout_id] * num_rollouts)
        return 1.0 / ((constant or 1.0) * num_rollouts)

    return [
        replace(s, weights=(s.loss_mask * np.float32(weight(s) if s.num_trained else 0.0)).astype(np.float32))
        for s in samples
    ]
