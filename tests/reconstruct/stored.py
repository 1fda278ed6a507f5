"""Calls as columns on top of calls of the test's own choice, as any store might lay them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from polar_mitm.columns import Lists, RolloutColumns, base_rows
from polar_mitm.reconstruct import columns_of
from polar_mitm.types import ModelCall
from tests.reconstruct.calls import cumulative


def stored(calls: Sequence[ModelCall], bases: Mapping[str, tuple[str, int]]) -> RolloutColumns:
    """`calls` as columns. `bases` says on top of which call a prompt is stored, and how many tokens it takes
    from there; it need be neither true nor the id of a call that there is.
    """
    found = columns_of("r1", calls)
    by_id = {call.call_id: call for call in calls}
    rest = [bases.get(call_id, (None, 0)) for call_id in found.call_ids]
    suffixes = [by_id[i].prompt_token_ids[n:] for i, (_, n) in zip(found.call_ids, rest, strict=True)]
    return replace(
        found,
        base=base_rows(found.call_ids, [base for base, _ in rest]),
        shared=np.array([n for _, n in rest], np.int64),
        suffix=_lists(suffixes, np.int32),
        completion=_lists([by_id[i].completion_token_ids for i in found.call_ids], np.int32),
        logprobs=_lists([by_id[i].behaviour_logprobs for i in found.call_ids], np.float32),
    )


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two lists share."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def shared_with(call: ModelCall, base: ModelCall) -> int:
    """How many tokens the prompt of `call` may take from `base`."""
    return common(call.prompt_token_ids, cumulative(base))


def _lists(lists: Sequence[Sequence[float]], kind: type) -> Lists:
    """In the middle of a larger buffer, as Arrow's may lie."""
    before, after = [-7, -7], [-7]
    offsets = np.cumsum([len(before), *map(len, lists)])
    return Lists(np.array([*before, *(x for each in lists for x in each), *after], dtype=kind), offsets)
