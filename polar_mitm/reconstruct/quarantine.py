"""Which calls may enter a trajectory. Nothing is repaired: a doubtful call is kept out, with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polar_mitm.columns import Lists, RolloutColumns
from polar_mitm.reconstruct.records import QuarantineReason
from polar_mitm.reconstruct.tokens import Tokens

_VLLM_LOGPROB_FLOOR = -9999.0  # what vLLM writes for -inf, which JSON cannot hold
_CONTEXT_MISMATCH = "engine_ignored_token_input"  # the fallback that says so


def examine(columns: RolloutColumns, tokens: Tokens, *, incomplete: bool) -> dict[int, QuarantineReason]:
    """Row to the reason why that call must not be trained on; the others may be.

    Args:
        columns: the calls of one rollout.
        tokens: the same calls' ids.
        incomplete: the rollout's record has holes, so nothing of it is admitted.
    """
    if incomplete:
        return dict.fromkeys(range(len(columns)), "incomplete_rollout")
    kept_out: dict[int, QuarantineReason] = {}

    def keep_out(rows: Iterable[int], why: QuarantineReason) -> None:
        for row in rows:
            kept_out.setdefault(row, why)

    copies = Counter(columns.call_ids)
    if len(copies) < len(columns):
        keep_out((r for r, i in enumerate(columns.call_ids) if copies[i] > 1), "duplicate_call_id")
    keep_out((r for r, status in enumerate(columns.status) if status == "failed"), "failed")
    keep_out((r for r, status in enumerate(columns.status) if status == "refused"), "refused")
    keep_out((r for r, why in enumerate(columns.fallback) if why == _CONTEXT_MISMATCH), "context_mismatch")
    if len(tokens.order) < len(columns):
        keep_out(sorted(set(range(len(columns))) - set(tokens.order)), "lost_prefix")
    num_sampled, reported = columns.completion.lengths, columns.num_reported
    keep_out(_where((np.array(tokens.num_prompt) == 0) | (num_sampled == 0)), "no_token_ids")
    keep_out(_where((columns.logprobs.lengths == 0) & (num_sampled > 0)), "no_logprobs")
    wrong_count = (reported != 0) & (reported != num_sampled)
    keep_out(_where((columns.logprobs.lengths != num_sampled) | wrong_count), "length_mismatch")
    keep_out(_rows_with_bad_logprobs(columns.logprobs), "bad_logprob")
    if min(_own(columns.suffix).min(initial=0), _own(columns.completion).min(initial=0)) < 0:
        keep_out((row for row in tokens.order if (tokens.ids(row) < 0).any()), "bad_token_id")

    admitted = [row for row in range(len(columns)) if row not in kept_out]
    if len({columns.tokenizer[row] for row in admitted}) > 1:
        keep_out(admitted, "mixed_tokenizers")
    if len({columns.model_served[row] for row in admitted if columns.replayed_from[row] is None}) > 1:
        keep_out(admitted, "mixed_models")
    return kept_out


def nothing_asked(
    columns: RolloutColumns, tokens: Tokens, kept_out: Mapping[int, QuarantineReason]
) -> list[int]:
    """Rows kept out for want of ids that no model was to serve, such as what warms up a WebSocket: there is
    no sample, and nothing to doubt.
    """
    empty = (columns.completion.lengths == 0) & (columns.num_reported == 0)
    return [
        row
        for row, why in kept_out.items()
        if why == "no_token_ids"
        and columns.status[row] == "ok"
        and not (columns.model_served[row] or tokens.num_prompt[row])
        and empty[row]
    ]


def _where(flags: NDArray[np.bool_]) -> list[int]:
    rows: list[int] = np.flatnonzero(flags).tolist()
    return rows


def _own(lists: Lists) -> NDArray[Any]:
    return lists.values[lists.offsets[0] : lists.offsets[-1]]


def _rows_with_bad_logprobs(logprobs: Lists) -> list[int]:
    values = _own(logprobs)
    # With a NaN in it, neither comparison holds.
    if values.max(initial=-1.0) <= 0.0 and values.min(initial=0.0) > _VLLM_LOGPROB_FLOOR:
        return []
    fine = (values > _VLLM_LOGPROB_FLOOR) & (values <= 0.0)
    at = logprobs.offsets - logprobs.offsets[0]
    return [row for row in range(at.size - 1) if not fine[at[row] : at[row + 1]].all()]
