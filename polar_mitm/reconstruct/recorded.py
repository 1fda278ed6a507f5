"""Recorded calls as columns, for callers that have `ModelCall`s rather than a store."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polar_mitm.columns import NO_BASE, Lists, RolloutColumns
from polar_mitm.types import ModelCall


def columns_of(rollout_id: str, calls: Sequence[ModelCall]) -> RolloutColumns:
    """The columns of `calls`, all of one rollout.

    A prompt that begins with all ids of the call before it, by start, is put on top of that call: turning
    Python ints into an array takes much longer than comparing them.
    """
    calls = sorted(calls, key=attrgetter("started_at", "call_id"))
    base: list[int] = []
    shared: list[int] = []
    suffixes: list[NDArray[np.int32]] = []
    completions: list[NDArray[np.int32]] = []
    before: list[int] = []
    for row, call in enumerate(calls):
        prompt, completion = list(call.prompt_token_ids), list(call.completion_token_ids)
        begins = bool(before) and prompt[: len(before)] == before
        base.append(row - 1 if begins else NO_BASE)
        shared.append(len(before) if begins else 0)
        suffixes.append(_ids(prompt[shared[-1] :]))
        completions.append(_ids(completion))
        before = prompt + completion
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and quarantined
        logprobs = [np.array(call.behaviour_logprobs, np.float32) for call in calls]

    def field(name: str) -> list[Any]:
        return [getattr(call, name) for call in calls]

    return RolloutColumns(
        rollout_id=rollout_id,
        call_ids=field("call_id"),
        base=np.array(base, np.int64),
        shared=np.array(shared, np.int64),
        suffix=_lists(suffixes),
        completion=_lists(completions),
        logprobs=_lists(logprobs),
        num_reported=np.array([call.usage.completion_tokens for call in calls], np.int64),
        started_at=field("started_at"),
        delivered=field("delivered"),
        status=field("status"),
        role=field("role"),
        finish_reason=field("finish_reason"),
        parent_call_id=field("parent_call_id"),
        continuation=field("continuation"),
        fallback=field("fallback"),
        policy_version=field("policy_version"),
        policy_version_last=field("policy_version_last"),
        replayed_from=field("replayed_from"),
        tokenizer=field("tokenizer"),
        model_served=field("model_served"),
        guided=field("guided"),
        agent_id=field("agent_id"),
    )


def _ids(ids: list[int]) -> NDArray[np.int32]:
    """Ids that 32 bits cannot hold are all -1, which no token is."""
    try:
        return np.array(ids, dtype=np.int32)
    except OverflowError:
        return np.full(len(ids), -1, dtype=np.int32)


def _lists(arrays: Sequence[NDArray[Any]]) -> Lists:
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([values.size for values in arrays], out=offsets[1:])
    return Lists(np.concatenate(arrays) if arrays else np.empty(0, np.int32), offsets)
