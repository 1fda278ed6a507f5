"""`build`: the calls of one rollout to its trajectories and their account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, get_args

import numpy as np

from polar_mitm.columns import RolloutColumns
from polar_mitm.reconstruct.forest import NO_PARENT, Forest, grow
from polar_mitm.reconstruct.quarantine import examine, nothing_asked
from polar_mitm.reconstruct.recorded import columns_of
from polar_mitm.reconstruct.records import Builder, BuildReport, MaskReason, Trajectory
from polar_mitm.reconstruct.samples import Samples
from polar_mitm.reconstruct.splice import splice
from polar_mitm.reconstruct.tokens import Tokens
from polar_mitm.types import ModelCall, Rollout

K = TypeVar("K", bound=str)


def build(
    calls: Sequence[ModelCall] | RolloutColumns,
    *,
    rollout: Rollout | None = None,
    builder: Builder = "forest",
    max_tokens: int | None = None,
    include_orphans: bool = False,
    include_auxiliary: bool = False,
    include_compaction: bool = False,
    include_guided: bool = False,
) -> tuple[Sequence[Trajectory], BuildReport]:
    """Rebuild one rollout. Pure, and independent of the order of `calls`.

    Builders: `forest`, one trajectory per root-to-leaf path of exact prefixes; `per-request`, one per call;
    `polar-splice`, Polar's rule with its context mismatches counted. In the first two, each call that a model
    served and that is not quarantined is in at least one trajectory, kept even where it is masked, and
    trajectories are assembled whenever one is asked for: to go over them twice is to assemble them twice.

    Args:
        calls: all calls of one rollout, as records or as columns.
        rollout: its record; when it is marked incomplete, every call is quarantined.
        max_tokens: how many tokens a trajectory may add to its context. A longer one is split at call
            boundaries into several, each behind its whole context: to cut that would train tokens under
            another context than they were sampled under. A call that alone adds more is masked. Not for
            `polar-splice`, which does not split.
        include_orphans: train answers that were superseded by another answer to the same prompt.
        include_auxiliary: train titles, routers and the like; they carry the task's reward undeservedly.
        include_compaction: train summaries of the history.
        include_guided: train what was sampled under a grammar (a schema, a forced tool). The engine's
            logprobs are those of the masked distribution, and a trainer's are not.

    Raises:
        ValueError: the calls, or the calls and `rollout`, belong to different rollouts; no such builder;
            `max_tokens` is not positive, or is given to a builder that does not split.
    """
    if builder not in get_args(Builder):
        raise ValueError(f"no builder {builder!r}: {', '.join(get_args(Builder))}")
    if max_tokens is not None and (max_tokens < 1 or builder == "polar-splice"):
        raise ValueError(f"max_tokens={max_tokens} with builder {builder!r}")
    columns = _one_rollout(calls, rollout)
    tokens = Tokens(columns)
    kept_out = examine(columns, tokens, incomplete=rollout is not None and rollout.incomplete is not None)
    forest = grow(columns, tokens, [row for row in range(len(columns)) if row not in kept_out])
    for row in nothing_asked(columns, tokens, kept_out):
        del kept_out[row]
    switches: dict[MaskReason, bool] = {
        "orphan": include_orphans or builder == "polar-splice",  # a rule that knows no orphans
        "auxiliary": include_auxiliary,
        "compaction": include_compaction,
        "guided": include_guided,
    }
    masked = _masked(columns, forest, {reason for reason, included in switches.items() if not included})
    group_id = rollout.group_id if rollout else None
    num_sampled = _num_sampled(columns)
    trajectories: Sequence[Trajectory]
    mismatched = 0
    if builder == "polar-splice":
        trajectories, mismatched = splice(columns, tokens, forest.rows, masked, group_id)
        trained = sum(t.num_trained for t in trajectories)
    else:
        alone = builder == "per-request"
        parent = [NO_PARENT] * len(columns) if alone else forest.parent
        samples = Samples(columns, tokens, parent, masked, group_id)
        for leaf in forest.rows if alone else forest.leaves:
            samples.add(leaf, max_tokens)
        trajectories = samples
        trained = sum(num_sampled[row] for row in samples.place if row not in masked)
    report = BuildReport(
        rollout_id=columns.rollout_id,
        num_calls=len(columns),
        num_trajectories=len(trajectories),
        sampled=sum(num_sampled),
        trained=trained,
        masked=_tokens_by(masked, num_sampled),
        quarantined=_tokens_by(kept_out, num_sampled),
        quarantined_calls=tuple(sorted((columns.call_ids[row], why) for row, why in kept_out.items())),
        builder=builder,
        mismatched=mismatched,
        num_continued=sum(how == "exact" for how in columns.continuation),
        fallbacks=dict(sorted(Counter(why for why in columns.fallback if why is not None).items())),
        tokenizers=_named(columns.tokenizer, columns.status),
        models_served=_named(columns.model_served, columns.status),
    )
    return trajectories, report


def _one_rollout(calls: Sequence[ModelCall] | RolloutColumns, rollout: Rollout | None) -> RolloutColumns:
    if isinstance(calls, RolloutColumns):
        rollout_ids = {calls.rollout_id}
    else:
        rollout_ids = {call.rollout_id for call in calls}
    if rollout is not None:
        rollout_ids.add(rollout.rollout_id)
    if len(rollout_ids) > 1:
        raise ValueError(f"calls of several rollouts in one build: {', '.join(sorted(rollout_ids))}")
    if isinstance(calls, RolloutColumns):
        return calls
    return columns_of(next(iter(rollout_ids), ""), calls)


def _masked(columns: RolloutColumns, forest: Forest, switched_off: set[MaskReason]) -> dict[int, MaskReason]:
    """Row to the reason why that call trains nowhere."""
    masked: dict[int, MaskReason] = {}
    for row in forest.rows:
        if columns.replayed_from[row] is not None:
            masked[row] = "replayed"
        elif forest.orphan[row] and "orphan" in switched_off:
            masked[row] = "orphan"
        elif (role := columns.role[row]) in switched_off:
            masked[row] = role
        elif columns.guided[row] and "guided" in switched_off:
            masked[row] = "guided"
    return masked


def _num_sampled(columns: RolloutColumns) -> list[int]:
    """[N] by the ids, or by the engine's own count where those are missing."""
    counts: list[int] = np.maximum(columns.completion.lengths, columns.num_reported).tolist()
    return counts


def _tokens_by(reasons: Mapping[int, K], num_sampled: Sequence[int]) -> dict[K, int]:
    counts: Counter[K] = Counter()
    for row, why in reasons.items():
        counts[why] += num_sampled[row]
    return dict(sorted(counts.items()))


def _named(names: Iterable[str], status: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name for name, how in zip(names, status, strict=True) if name and how != "refused"}))
