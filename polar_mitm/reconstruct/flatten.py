"""From the forest to trajectories: one per leaf, each sampled token trained in one of them at most."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from polar_mitm.reconstruct.forest import Node
from polar_mitm.reconstruct.records import CallSpan, MaskReason, Trajectory


def mask_reason(node: Node, masked: Collection[MaskReason]) -> MaskReason | None:
    """Why the call trains nowhere, if so; `masked` lists the kinds of call that are switched off."""
    if node.orphan and "orphan" in masked:
        return "orphan"
    if node.call.role == "auxiliary" and "auxiliary" in masked:
        return "auxiliary"
    if node.call.role == "compaction" and "compaction" in masked:
        return "compaction"
    return None


def flatten(nodes: Sequence[Node], masked: Collection[MaskReason], group_id: str | None) -> list[Trajectory]:
    """One trajectory per leaf, live leaves first, then by start and id.

    A call shared by several paths trains in the first of them, so never on an orphan's path.
    """
    leaves = sorted((n for n in nodes if not n.children), key=lambda n: (n.orphan, n.order))
    trained: set[str] = set()
    return [_trajectory(leaf, masked, group_id, trained) for leaf in leaves]


def _trajectory(
    leaf: Node, masked: Collection[MaskReason], group_id: str | None, trained: set[str]
) -> Trajectory:
    call = leaf.call
    loss_mask = np.zeros(leaf.ids.size, dtype=np.uint8)
    logprobs = np.zeros(leaf.ids.size, dtype=np.float32)
    spans: list[CallSpan] = []
    versions: set[str] = set()
    for node in leaf.path():
        reason = mask_reason(node, masked)
        if node.call.call_id in trained:
            reason = "shared_prefix"
        sampled = slice(node.num_prompt, node.ids.size)
        version = node.call.policy_version
        if reason is None:
            loss_mask[sampled] = 1
            logprobs[sampled] = node.logprobs
            trained.add(node.call.call_id)
            versions |= {version} if version is not None else set()
        spans.append(
            CallSpan(
                call_id=node.call.call_id,
                start=spans[-1].end if spans else 0,
                sampled_start=sampled.start,
                end=sampled.stop,
                mask_reason=reason,
                truncated=node.call.status == "cancelled" or node.call.finish_reason == "length",
                policy_version=version,
            )
        )
    ordered = sorted(versions, key=lambda version: (len(version), version))
    return Trajectory(
        trajectory_id=call.call_id,
        rollout_id=call.rollout_id,
        group_id=group_id,
        role=call.role,
        token_ids=leaf.ids,
        loss_mask=loss_mask,
        behaviour_logprobs=logprobs,
        spans=tuple(spans),
        policy_version_min=ordered[0] if ordered else None,
        policy_version_max=ordered[-1] if ordered else None,
    )
