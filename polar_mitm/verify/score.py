"""Scoring trajectories again, whoever does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from polar_mitm.verify.records import Path, Span
from polar_mitm.verify.report import Examination


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
    examination: Examination, paths: Iterable[Path], scorer: Scorer | None, in_flight: int = 4
) -> AsyncIterator[int]:
    """Look at each trajectory once, at most so many at a time; yields how many have been scored or need not.

    Raises:
        EngineUnfit, SetupError: the scorer fails as a whole.
    """
    waiting: set[asyncio.Task[None]] = set()
    try:
        for path in paths:
            spans = examination.check(path)
            if scorer is None or not spans:
                yield 1
                continue
            waiting.add(asyncio.create_task(_score(examination, path, spans, scorer)))
            if len(waiting) >= in_flight:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                yield _ended(done)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            yield _ended(done)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _score(examination: Examination, path: Path, spans: list[Span], scorer: Scorer) -> None:
    try:
        scores = await scorer.score(path.token_ids[: spans[-1].end])
    except Unscorable as error:
        examination.refused(path, spans, str(error))
    else:
        examination.compare(path, spans, scores)


def _ended(done: set[asyncio.Task[None]]) -> int:
    errors = [error for task in done if (error := task.exception()) is not None]
    if errors:
        raise errors[0]
    return len(done)
