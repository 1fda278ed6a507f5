"""Rollouts out of a store as numpy arrays: no token becomes a Python object on the way.

DuckDB decodes lists by the 2,048 rows, and rollouts that ran side by side share those rows. So several
rollouts are read at once, as many as a bound on their tokens allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polar_mitm.columns import LOST_BASE, NO_BASE, Lists, RolloutColumns, base_rows
from polar_mitm.store.offline import Selects
from polar_mitm.store.rows import _LINEAGE_FIELDS, quote
from polar_mitm.types import GUIDED, CallRole, CallStatus, Continuation

_MAX_TOKENS = 8 << 20  # stored tokens of the rollouts that are read at once, 64 MiB; one may have more
_MAX_ROLLOUTS = 256
_LISTS = {"prompt_suffix": np.int32, "completion_token_ids": np.int32, "behaviour_logprobs": np.float32}
# What cannot be read, or is a later version's, is a failed call: nothing of it is trained on.
_COLUMNS = """
    SELECT call_id, rollout_id, prompt_parent_id, coalesce(prompt_shared, 0)::BIGINT AS prompt_shared,
        coalesce(num_prompt, 0)::BIGINT AS num_prompt,
        prompt_suffix, completion_token_ids, behaviour_logprobs,
        coalesce(try_cast(try(usage ->> 'completion_tokens') AS BIGINT), 0) AS num_reported,
        coalesce(started_at, 0.0) AS started_at, coalesce(delivered, false) AS delivered,
        CASE WHEN status IN {statuses} AND role IN {roles} AND json_valid(usage)
            AND (lineage IS NULL OR json_valid(lineage) AND json_type(lineage) = 'OBJECT'
                AND list_has_all({lineage}, json_keys(lineage)))
            AND coalesce(try(lineage ->> 'continuation'), 'none') IN {continuations}
        THEN status ELSE 'failed' END AS status,
        coalesce(role, 'main') AS role, finish_reason, parent_call_id,
        coalesce(try(lineage ->> 'continuation'), 'none') AS continuation,
        try(lineage ->> 'fallback') AS fallback, policy_version,
        try(lineage ->> 'policy_version_last') AS policy_version_last,
        try(lineage ->> 'replayed_from') AS replayed_from,
        coalesce(try(lineage ->> 'tokenizer'), '') AS tokenizer, coalesce(model_served, '') AS model_served,
        coalesce(notes, '') LIKE '%"{guided}%' AS guided,
        try(lineage ->> 'agent_id') AS agent_id
    FROM stored_calls WHERE rollout_id IN ({ids}) AND rollout_id BETWEEN {first} AND {last}
"""
_KNOWN = {
    "statuses": get_args(CallStatus),
    "roles": get_args(CallRole),
    "continuations": get_args(Continuation),
    "lineage": list(_LINEAGE_FIELDS),
    "guided": GUIDED,
}
_PLAIN = (
    "started_at", "delivered", "status", "role", "finish_reason", "parent_call_id", "continuation",
    "fallback", "policy_version", "policy_version_last", "replayed_from", "tokenizer", "model_served",
    "guided", "agent_id",
)  # fmt: skip


def rollout_columns(reader: Selects, rollout_id: str) -> RolloutColumns:
    """The calls of one rollout; none where the store has none of it.

    Raises:
        StoreError: the store cannot be read.
    """
    return next(each_rollout(reader, [rollout_id]))


def each_rollout(reader: Selects, rollout_ids: Sequence[str]) -> Iterator[RolloutColumns]:
    """The calls of each of these rollouts, in this order, a few rollouts in memory at a time.

    Raises:
        StoreError: the store cannot be read.
    """
    found = reader.sql(
        "SELECT rollout_id, sum(num_prompt - prompt_shared)::BIGINT AS num_tokens "
        "FROM stored_calls GROUP BY rollout_id"
    )
    num_tokens = dict(zip(found["rollout_id"].to_pylist(), found["num_tokens"].to_pylist(), strict=True))
    group: list[str] = []
    for rollout_id in rollout_ids:
        group.append(rollout_id)
        if len(group) > 1 and (
            sum(num_tokens.get(r) or 0 for r in group) > _MAX_TOKENS or len(group) > _MAX_ROLLOUTS
        ):
            yield from _read(reader, group[:-1])
            group = group[-1:]
    if group:
        yield from _read(reader, group)


def _read(reader: Selects, rollout_ids: Sequence[str]) -> Iterator[RolloutColumns]:
    ids = ", ".join(map(quote, rollout_ids))
    # DuckDB passes over rows out of a range without reading them, over rows not in a list it does not.
    first, last = quote(min(rollout_ids)), quote(max(rollout_ids))
    table = reader.sql(_COLUMNS.format(ids=ids, first=first, last=last, **_KNOWN)).combine_chunks()
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, rollout_id in enumerate(table["rollout_id"].to_pylist()):
        rows_of[rollout_id].append(row)
    for rollout_id in rollout_ids:
        rows = rows_of[rollout_id]
        together = rows and rows[-1] - rows[0] == len(rows) - 1  # then they need not be copied
        yield _columns(
            rollout_id,
            table.slice(rows[0], len(rows)) if together else table.take(pa.array(rows, pa.int64())),
        )


def _columns(rollout_id: str, table: pa.Table) -> RolloutColumns:
    call_ids = table["call_id"].to_pylist()
    suffix, completion, logprobs = (lists_of(table[name], kind) for name, kind in _LISTS.items())
    base = base_rows(call_ids, table["prompt_parent_id"].to_pylist())
    shared = np.where(base == NO_BASE, 0, _ints(table["prompt_shared"]))
    num_prompt = _ints(table["num_prompt"])
    # A prompt that does not come out as long as it was is not that prompt.
    num_ids = num_prompt + completion.lengths
    num_base = np.where(base >= 0, num_ids[np.maximum(base, 0)], 0) if len(base) else shared
    wrong = (shared + suffix.lengths != num_prompt) | ((base >= 0) & ((shared > num_base) | (shared < 0)))
    return RolloutColumns(
        rollout_id,
        call_ids,
        base=np.where(wrong, LOST_BASE, base),
        shared=shared,
        suffix=suffix,
        completion=completion,
        logprobs=logprobs,
        num_reported=_ints(table["num_reported"]),
        **{name: table[name].to_pylist() for name in _PLAIN},
    )


def _ints(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def lists_of(column: pa.ChunkedArray, kind: Any) -> Lists:
    """A list column as it lies in memory; a null is an empty list."""
    chunk = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if chunk.null_count:
        lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values = chunk.flatten()
    else:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values
    if values.null_count:  # neither is ever taken for a token
        values = values.fill_null(float("nan") if pa.types.is_floating(values.type) else -1)
    return Lists(values.to_numpy().astype(kind, copy=False), offsets.astype(np.int64))
