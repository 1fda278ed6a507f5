"""Short ways to write down recorded calls, and what must hold of every build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_mitm.columns import RolloutColumns
from polar_mitm.reconstruct import BuildReport, Trajectory, build
from polar_mitm.types import ModelCall


def call(call_id: str, prompt: Sequence[int], sampled: Sequence[int], **fields: Any) -> ModelCall:
    """A delivered main call that starts at its id's place in the alphabet."""
    defaults: dict[str, Any] = {
        "rollout_id": "r1",
        "seq": 0,
        "dialect": "anthropic",
        "route": "/v1/messages",
        "status": "ok",
        "delivered": True,
        "finish_reason": "stop",
        "started_at": float(ord(call_id[0])),
        "behaviour_logprobs": [-(i + 1) / 8 for i in range(len(sampled))],
    }
    return ModelCall(
        call_id=call_id,
        prompt_token_ids=list(prompt),
        completion_token_ids=list(sampled),
        **{**defaults, **fields},
    )


def cumulative(of: ModelCall) -> list[int]:
    """Prompt and completion of a call."""
    return of.prompt_token_ids + of.completion_token_ids


def follow(
    call_id: str, parent: ModelCall, added: Sequence[int], sampled: Sequence[int], **f: Any
) -> ModelCall:
    """A call whose prompt is everything so far and `added`."""
    return call(call_id, [*cumulative(parent), *added], sampled, **f)


def trained_in(trajectories: Sequence[Trajectory]) -> dict[str, list[str]]:
    """Call id to the trajectories in which it trains; no entry for a call that trains nowhere."""
    places: dict[str, list[str]] = {}
    for trajectory in trajectories:
        for span in trajectory.spans:
            if span.mask_reason is None:
                places.setdefault(span.call_id, []).append(trajectory.trajectory_id)
    return places


def paths(trajectories: Sequence[Trajectory]) -> dict[str, str]:
    """Trajectory id to its call ids, joined."""
    return {t.trajectory_id: "".join(s.call_id for s in t.spans) for t in trajectories}


def reasons(trajectories: Sequence[Trajectory]) -> dict[tuple[str, str], str]:
    """(trajectory, call) to the reason why the call is masked there."""
    return {
        (t.trajectory_id, s.call_id): s.mask_reason for t in trajectories for s in t.spans if s.mask_reason
    }


def polar(calls: Sequence[ModelCall], **options: Any) -> tuple[Sequence[Trajectory], BuildReport]:
    """Polar's rule, with what holds of it too: each call in one trajectory at most, and the account."""
    trajectories, report = build(calls, builder="polar-splice", **options)
    assert report.adds_up and report.trained == sum(t.num_trained for t in trajectories)
    placed = [s.call_id for t in trajectories for s in t.spans]
    assert len(set(placed)) == len(placed)
    by_id = {c.call_id: c for c in calls}
    for t in trajectories:
        for span in t.spans:
            sampled = slice(span.sampled_start, span.end)
            assert t.token_ids[sampled].tolist() == by_id[span.call_id].completion_token_ids
            assert set(t.loss_mask[sampled].tolist()) == {int(span.mask_reason is None)}
    return trajectories, report


def checked(
    calls: Sequence[ModelCall], columns: RolloutColumns | None = None, **options: Any
) -> tuple[list[Trajectory], BuildReport]:
    """`build`, of the same calls' `columns` where given, with the rules that hold whatever the calls are."""
    lazy, report = build(calls if columns is None else columns, **options)
    trajectories = list(lazy)
    assert len(lazy) == len(trajectories) == report.num_trajectories
    assert report.trained == sum(t.num_trained for t in trajectories) and report.mismatched == 0
    assert report.adds_up
    assert report.sampled == sum(max(len(c.completion_token_ids), c.usage.completion_tokens) for c in calls)
    by_id = {c.call_id: c for c in calls}
    for trajectory in trajectories:
        ids = trajectory.token_ids.tolist()
        size = len(ids)
        assert trajectory.loss_mask.shape == trajectory.behaviour_logprobs.shape == (size,)
        dtypes = (trajectory.token_ids.dtype, trajectory.loss_mask.dtype, trajectory.behaviour_logprobs.dtype)
        assert dtypes == (np.int32, np.uint8, np.float32)
        assert [s.start for s in trajectory.spans] == [0, *(s.end for s in trajectory.spans[:-1])]
        assert trajectory.spans[-1].end == size
        mask, logprobs = np.zeros(size), np.zeros(size, dtype=np.float32)
        for span in trajectory.spans:
            source = by_id[span.call_id]
            assert ids[: span.sampled_start] == source.prompt_token_ids, "context, id for id"
            assert ids[span.sampled_start : span.end] == source.completion_token_ids
            if span.mask_reason is None:
                mask[span.sampled_start : span.end] = 1
                logprobs[span.sampled_start : span.end] = source.behaviour_logprobs
        assert np.array_equal(mask, trajectory.loss_mask)
        assert np.array_equal(logprobs, trajectory.behaviour_logprobs)
    assert all(len(places) == 1 for places in trained_in(trajectories).values()), "trained once"
    present = {s.call_id for t in trajectories for s in t.spans}
    quarantined = {call_id for call_id, _ in report.quarantined_calls}
    assert present | quarantined == set(by_id) and not present & quarantined
    return trajectories, report
