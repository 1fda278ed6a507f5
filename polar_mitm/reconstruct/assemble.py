"""One trajectory out of its ids and of where its calls lie in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from polar_mitm.columns import RolloutColumns
from polar_mitm.reconstruct.records import CallSpan, MaskReason, Trajectory
from polar_mitm.types import CallRole

# A call's row, where its sampled ids begin and end, and why they are masked.
Piece = tuple[int, int, int, MaskReason | None]


def assemble(
    columns: RolloutColumns, ids: NDArray[np.int32], pieces: Sequence[Piece], group_id: str | None
) -> Trajectory:
    """The trajectory over `ids` [T] whose calls are `pieces`, in order; the last ends at T."""
    # One block, and filled: for two, or for zeros, malloc takes fresh pages each time, which costs more than
    # all the rest.
    block = np.full(5 * ids.size, 0, dtype=np.uint8)
    logprobs, loss_mask = block[: 4 * ids.size].view(np.float32), block[4 * ids.size :]
    sampled, at = columns.logprobs.values, columns.logprobs.offsets
    spans: list[CallSpan] = []
    versions: set[str | None] = set()
    start = 0
    for row, sampled_start, end, reason in pieces:
        version, version_last = columns.policy_version[row], columns.policy_version_last[row]
        if reason is None:
            loss_mask[sampled_start:end] = 1
            logprobs[sampled_start:end] = sampled[at[row] : at[row + 1]]
            versions.add(version)
            versions.add(version_last)
        truncated = columns.status[row] == "cancelled" or columns.finish_reason[row] == "length"
        spans.append(
            CallSpan(
                columns.call_ids[row], start, sampled_start, end, reason, truncated, version, version_last
            )
        )
        start = end
    last = pieces[-1][0]
    ordered = sorted((v for v in versions if v is not None), key=lambda version: (len(version), version))
    return Trajectory(
        trajectory_id=columns.call_ids[last],
        rollout_id=columns.rollout_id,
        group_id=group_id,
        role=cast(CallRole, columns.role[last]),
        token_ids=ids,
        loss_mask=loss_mask,
        behaviour_logprobs=logprobs,
        spans=tuple(spans),
        policy_version_min=ordered[0] if ordered else None,
        policy_version_max=ordered[-1] if ordered else None,
        agent_id=columns.agent_id[last],
    )
