"""How much better was a rollout than the others of its group? No torch here. R rollouts of one step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polar_mitm_trainer.config import AdvantageConfig

_EPSILON = 1e-4  # added to the standard deviation, as TRL does
_ZERO = 1e-8  # a standard deviation that is rounding
_MOST = 1e30  # float32 ends at 3.4e38, and advantages are multiplied


def is_usable(reward: float) -> bool:
    """Whether a reward is a number that float32 advantages can be made of."""
    return abs(reward) <= _MOST


def group_advantages(
    rewards: Sequence[float | None], groups: Sequence[str], config: AdvantageConfig
) -> NDArray[np.float64]:
    """Advantages [R] of rollouts with `rewards` [R] in `groups` [R] (ids); NaN for those that have none.

    A rollout without reward is left out, and so are groups in which fewer than two have one or all have the
    same: there is nothing to learn from them. The rest are centred on their group's mean, or on that of the
    others in it (leave-one-out, arXiv 2402.14740), and divided by the group's standard deviation if
    `config.std`: the sample one (n - 1) plus 1e-4, as in TRL 1.16 (GRPO, arXiv 2402.03300).

    Raises:
        ValueError: a reward is NaN, infinite or beyond 1e30 (it says whose), or the lengths differ.
    """
    values = np.array([np.nan if reward is None else reward for reward in rewards], dtype=np.float64)
    given = np.array([reward is not None for reward in rewards], dtype=bool)
    if bad := [at for at in np.flatnonzero(given) if not is_usable(values[at])]:
        told = ", ".join(f"{values[at]} (number {at}, group {groups[at]})" for at in bad[:5])
        raise ValueError(f"{len(bad)} of {len(rewards)} rewards are no numbers, or too large: {told}")
    members: dict[str, list[int]] = defaultdict(list)
    for at, group in zip(range(len(values)), groups, strict=True):
        members[group].append(at)

    advantages = np.full(len(values), np.nan)
    for group_members in members.values():
        rewarded = [at for at in group_members if given[at]]
        n = len(rewarded)
        if n < 2:
            continue
        centred = values[rewarded] - values[rewarded].mean()
        std = float(np.sqrt(centred @ centred / (n - 1)))
        if std <= _ZERO:
            continue
        if config.leave_one_out:
            centred *= n / (n - 1)
        advantages[rewarded] = centred / (std + _EPSILON) if config.std else centred
    return advantages
