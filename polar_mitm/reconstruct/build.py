"""`build`: the calls of one rollout to its trajectories and their account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from polar_mitm.reconstruct.flatten import flatten, mask_reason
from polar_mitm.reconstruct.forest import link, mark_orphans
from polar_mitm.reconstruct.quarantine import admit, num_sampled
from polar_mitm.reconstruct.records import BuildReport, MaskReason, QuarantineReason, Trajectory
from polar_mitm.types import ModelCall, Rollout


def build(
    calls: Sequence[ModelCall],
    *,
    rollout: Rollout | None = None,
    include_orphans: bool = False,
    include_auxiliary: bool = False,
    include_compaction: bool = False,
) -> tuple[list[Trajectory], BuildReport]:
    """Rebuild one rollout as an exact-prefix forest. Pure, and independent of the order of `calls`.

    Every call that is not quarantined is in at least one trajectory, kept even where it is masked.

    Args:
        calls: all calls of one rollout.
        rollout: its record; when it is marked incomplete, every call is quarantined.
        include_orphans: train answers that were superseded by another answer to the same prompt.
        include_auxiliary: train titles, routers and the like; they carry the task's reward undeservedly.
        include_compaction: train summaries of the history.

    Raises:
        ValueError: the calls, or the calls and `rollout`, belong to different rollouts.
    """
    rollout_ids = {call.rollout_id for call in calls} | ({rollout.rollout_id} if rollout else set())
    if len(rollout_ids) > 1:
        raise ValueError(f"calls of several rollouts in one build: {', '.join(sorted(rollout_ids))}")
    switches: dict[MaskReason, bool] = {
        "orphan": include_orphans,
        "auxiliary": include_auxiliary,
        "compaction": include_compaction,
    }
    masked = [reason for reason, included in switches.items() if not included]

    nodes, kept_out = admit(calls, incomplete=rollout is not None and rollout.incomplete is not None)
    link(nodes)
    mark_orphans(nodes)
    trajectories = flatten(nodes, masked, rollout.group_id if rollout else None)

    masked_tokens: Counter[MaskReason] = Counter()
    for node in nodes:
        if reason := mask_reason(node, masked):
            masked_tokens[reason] += num_sampled(node.call)
    quarantined_tokens: Counter[QuarantineReason] = Counter()
    for call, why in kept_out:
        quarantined_tokens[why] += num_sampled(call)
    report = BuildReport(
        rollout_id=next(iter(rollout_ids), ""),
        num_calls=len(calls),
        num_trajectories=len(trajectories),
        sampled=sum(map(num_sampled, calls)),
        trained=sum(t.num_trained for t in trajectories),
        masked=dict(sorted(masked_tokens.items())),
        quarantined=dict(sorted(quarantined_tokens.items())),
        quarantined_calls=tuple(sorted((call.call_id, why) for call, why in kept_out)),
    )
    return trajectories, report
