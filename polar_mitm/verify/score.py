"""Scoring trajectories again, whoever does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
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
    examined: Examined, scorer: Scorer, weights: str | None, tolerance: float
) -> AsyncIterator[int]:
    """Compare one rollout's trajectories with scores of theirs; yields the length of each that is done.

    Args:
        weights: what the scorer holds (`weights_name`); calls sampled under others are left out and counted.
            None: whatever the calls were sampled under.
        tolerance: a token whose |drift| in nats is greater is an outlier.

    Raises:
        EngineUnfit: the scorer fails as a whole.
    """
    examined.weights, examined.tolerance = weights, tolerance
    examined.skip(examined.paths)
    waiting = [asyncio.create_task(_one(examined, path, scorer)) for path in examined.paths]
    try:
        for done in asyncio.as_completed(waiting):
            yield await done
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _one(examined: Examined, path: Path, scorer: Scorer) -> int:
    spans = examined.comparable(path)
    if spans:
        try:
            scores = await scorer.score(path.token_ids[: spans[-1].end])
        except Unscorable as error:
            examined.leave_out("refused", sum(span.end - span.sampled_start for span in spans))
            examined.complaints.append(f"{path.trajectory_id}: {error}")
        else:
            examined.compare(path, scores)
    return path.token_ids.size
