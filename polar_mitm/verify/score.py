"""Scoring trajectories again, whoever does it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from polar_mitm.verify.records import Path
from polar_mitm.verify.report import Examined


class Unscorable(Exception):
    """These ids cannot be scored here; the message says why. Others may."""


class Scorer(Protocol):
    """Teacher forcing: what logprob has each id, given the ids before it?"""

    async def score(self, ids: NDArray[np.int32]) -> NDArray[np.float64]:
        """Raw logprobs [T] of ids [T] in nats; NaN at the first, and where there is no room.

        Raises:
            Unscorable: not these ids.
        """


async def score(
    examined: Examined,
    scorer: Scorer,
    weights: str | None,
    tolerance: float,
    on_scored: Callable[[int], None] = lambda num_tokens: None,
) -> None:
    """Compare one rollout's trajectories with scores of theirs.

    Args:
        weights: what the scorer holds (`weights_name`); calls sampled under others are left out and counted.
            None: whatever the calls were sampled under.
        tolerance: a token whose |drift| in nats is greater is an outlier.
        on_scored: told the length of each trajectory that is done.
    """
    examined.weights, examined.tolerance = weights, tolerance
    examined.skip(examined.paths)

    async def one(path: Path) -> None:
        spans = examined.comparable(path)
        if spans:
            try:
                scores = await scorer.score(path.token_ids[: spans[-1].end])
            except Unscorable as error:
                examined.leave_out("refused", sum(s.end - s.sampled_start for s in spans))
                examined.complaints.append(f"{path.trajectory_id}: {error}")
            else:
                examined.compare(path, scores)
        on_scored(path.token_ids.size)

    await asyncio.gather(*map(one, examined.paths))
