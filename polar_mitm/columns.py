"""The calls of one rollout as columns of numpy arrays: what a store fills and reconstruction reads.

No token is a Python object here. N calls; the lists of all calls lie one after the other in flat arrays,
list `i` at `offsets[i] : offsets[i + 1]`. A prompt is kept as it is stored, on top of an earlier call:

    prompt(i) = (prompt + completion)(base[i])[: shared[i]] + suffix(i)

or `suffix(i)` alone where `base[i]` is NO_BASE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_BASE = -1
LOST_BASE = -2  # it names a call that is not there, or that two records claim to be


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """N lists in one array: `values` [sum of lengths], `offsets` [N + 1] int64, not falling.

    `values` may hold more, before the first list and after the last: a view of a larger buffer is fine.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N]"""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutColumns:
    """N calls of one rollout, in any order; one element of each column per call.

    `base` [N] int64 is the row that the prompt is stored on top of, or NO_BASE, or LOST_BASE; `shared` [N]
    int64 is 0 without a base. `suffix` and `completion` hold int32 ids, `logprobs` float32 nats.
    `num_reported` [N] int64 is the engine's own count of sampled tokens (`usage.completion_tokens`), 0 where
    it gave none. Every other column is the field or property of `ModelCall` of that name.
    """

    rollout_id: str
    call_ids: Sequence[str]
    base: NDArray[np.int64]
    shared: NDArray[np.int64]
    suffix: Lists
    completion: Lists
    logprobs: Lists
    num_reported: NDArray[np.int64]
    started_at: Sequence[float]
    delivered: Sequence[bool]
    status: Sequence[str]
    role: Sequence[str]
    finish_reason: Sequence[str | None]
    parent_call_id: Sequence[str | None]
    continuation: Sequence[str]
    fallback: Sequence[str | None]
    policy_version: Sequence[str | None]
    policy_version_last: Sequence[str | None]
    replayed_from: Sequence[str | None]
    tokenizer: Sequence[str]
    model_served: Sequence[str]
    guided: Sequence[bool]
    agent_id: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.call_ids)


def base_rows(call_ids: Sequence[str], base_ids: Sequence[str | None]) -> NDArray[np.int64]:
    """The column `base` [N] for calls that are stored on top of the calls named `base_ids`."""
    rows: dict[str | None, int] = {}
    for row, call_id in enumerate(call_ids):
        rows[call_id] = LOST_BASE if call_id in rows else row
    rows[None] = NO_BASE
    return np.array([rows.get(base_id, LOST_BASE) for base_id in base_ids], dtype=np.int64)
