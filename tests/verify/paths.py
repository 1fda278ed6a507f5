"""Short ways to write down trajectories and what was recorded of their calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from polar_mitm.reconstruct import BuildReport, Trajectory, build
from polar_mitm.types import ModelCall
from polar_mitm.verify import Examination, RolloutReport, sampled, score
from polar_mitm.verify.score import Scorer
from tests.reconstruct.calls import call, follow

WEIGHTS = "m@v1"


def conversation(num_calls: int = 3, **fields: object) -> list[ModelCall]:
    """Calls `a`, `b`, ... that continue each other, with ids that tell their places."""
    served = {"model_served": "m", "policy_version": "v1", **fields}
    calls = [call("a", range(100, 110), range(200, 204), **served)]
    for number in range(1, num_calls):
        added = range(300 + 10 * number, 305 + 10 * number)
        answer = range(400 + 10 * number, 403 + 10 * number)
        calls.append(follow("abcdefgh"[number], calls[-1], added, answer, **served))
    return calls


def built(calls: Sequence[ModelCall], **options: object) -> tuple[list[Trajectory], BuildReport]:
    """The forest's trajectories, each of which may be changed."""
    trajectories, report = build(calls, **options)
    return [copied(t) for t in trajectories], report


def copied(trajectory: Trajectory) -> Trajectory:
    """One whose arrays are nobody else's."""
    return replace(
        trajectory,
        token_ids=trajectory.token_ids.copy(),
        loss_mask=trajectory.loss_mask.copy(),
        behaviour_logprobs=trajectory.behaviour_logprobs.copy(),
    )


@dataclass
class Table:
    """A scorer that knows the logprob of each id, and what it was asked for."""

    logprobs: dict[int, float]
    asked: list[list[int]]

    async def score(self, ids: np.ndarray) -> np.ndarray:
        self.asked.append(ids.tolist())
        scores = np.array([self.logprobs.get(i, -9.0) for i in ids.tolist()])
        scores[:1] = np.nan
        return scores


def recorded(calls: Sequence[ModelCall]) -> Table:
    """A scorer that says what was recorded; ids must not repeat."""
    pairs = [pair for c in calls for pair in zip(c.completion_token_ids, c.behaviour_logprobs, strict=True)]
    return Table(dict(pairs), [])


async def verified(
    calls: Sequence[ModelCall],
    trajectories: Sequence[Trajectory] | None = None,
    scorer: Scorer | None = None,
    account: BuildReport | None = None,
    **options: object,
) -> RolloutReport:
    """All of it, as the command does it. What is not given is built."""
    made, of_made = built(calls)
    examination = Examination("r1", map(sampled, calls), **options)
    async for _ in score(examination, made if trajectories is None else trajectories, scorer):
        pass
    return examination.finished(account or of_made)
