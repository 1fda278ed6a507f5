"""Reconstruction, slow and obvious: lists, nested loops, the definitions as they are written."""

from __future__ import annotations

from collections.abc import Sequence

from polar_mitm.types import ModelCall
from tests.reconstruct.calls import cumulative


def start(of: ModelCall) -> tuple[float, str]:
    return of.started_at, of.call_id


def parent_of(child: ModelCall, calls: Sequence[ModelCall]) -> ModelCall | None:
    if child.role in ("auxiliary", "compaction"):
        return None
    best = None
    for other in calls:
        ids = cumulative(other)
        if other.role in ("auxiliary", "compaction") or len(ids) >= len(child.prompt_token_ids):
            continue
        if child.prompt_token_ids[: len(ids)] != ids:
            continue
        rank = (-len(ids), other.call_id != child.parent_call_id, not other.delivered, start(other))
        if best is None or rank < best[0]:
            best = (rank, other)
    return best[1] if best else None


def expected(
    calls: Sequence[ModelCall], *, include_orphans: bool
) -> tuple[list[list[str]], dict[str, str], dict[str, str]]:
    """Paths of call ids in order, call id to the leaf where it trains, call id to why it is masked.

    `calls` must all be fit for training.
    """
    parents = {c.call_id: parent_of(c, calls) for c in calls}
    extended = {p.call_id for p in parents.values() if p}
    named = {c.parent_call_id for c in calls if c.fallback != "ambiguous"}
    went_on = extended | {c.call_id for c in calls if c.delivered and c.call_id in named}
    orphans = set()
    for one in calls:
        same = [o for o in calls if (o.role, o.prompt_token_ids) == (one.role, one.prompt_token_ids)]
        if any(o.call_id in went_on for o in same):
            alive = one.call_id in went_on
        elif any(o.delivered for o in same):
            alive = one.delivered
        else:
            alive = start(one) == max(start(o) for o in same)
        if not alive:
            orphans.add(one.call_id)
    leaves = sorted(
        (c for c in calls if c.call_id not in extended), key=lambda c: (c.call_id in orphans, start(c))
    )
    trained: dict[str, str] = {}
    masked: dict[str, str] = {}
    paths = []
    for leaf in leaves:
        path = [leaf]
        while (above := parents[path[0].call_id]) is not None:
            path.insert(0, above)
        paths.append([c.call_id for c in path])
        for step in path:
            if step.call_id in orphans and not include_orphans:
                masked[step.call_id] = "orphan"
            elif step.role in ("auxiliary", "compaction"):
                masked[step.call_id] = step.role
            else:
                trained.setdefault(step.call_id, leaf.call_id)
    return paths, trained, masked


def spliced(calls: Sequence[ModelCall]) -> tuple[list[list[int]], int, int]:
    """Polar's rule: token streams, trained tokens with another context than their own, tokens dropped."""
    chains: list[list[ModelCall]] = []
    for one in sorted(calls, key=start):
        best: list[ModelCall] | None = None
        for chain in chains:
            tip = chain[-1].prompt_token_ids
            if one.prompt_token_ids[: len(tip)] == tip and (
                best is None or len(tip) > len(best[-1].prompt_token_ids)
            ):
                best = chain
        if best is None:
            chains.append([one])
        else:
            best.append(one)
    streams, mismatched, dropped = [], 0, 0
    for chain in chains:
        ended = [c.completion_token_ids[-1] for c in chain if c.finish_reason in ("stop", "tool_calls")]
        stream, before, broken = list(chain[0].prompt_token_ids), None, False
        for one in chain:
            if before is not None and not broken:
                tail = one.prompt_token_ids[len(before.prompt_token_ids) :]
                broken = not ended or ended[0] not in tail
                if not broken:
                    at = tail.index(ended[0])
                    stream += tail[at + 1 :] if before.completion_token_ids[-1] == ended[0] else tail[at:]
            if broken:
                dropped += len(one.completion_token_ids)
                continue
            mismatched += len(one.completion_token_ids) * (stream != one.prompt_token_ids)
            stream += one.completion_token_ids
            before = one
        streams.append(stream)
    return streams, mismatched, dropped
