"""Which calls may enter a trajectory. Nothing is repaired: a doubtful call is kept out, with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from polar_mitm.reconstruct.forest import Node
from polar_mitm.reconstruct.records import QuarantineReason
from polar_mitm.types import ModelCall

_VLLM_LOGPROB_FLOOR = -9999.0  # what vLLM writes for -inf, which JSON cannot hold


def num_sampled(call: ModelCall) -> int:
    """How many tokens the engine sampled for `call`, by its own count where the ids are missing."""
    return max(len(call.completion_token_ids), call.usage.completion_tokens)


def admit(
    calls: Sequence[ModelCall], incomplete: bool
) -> tuple[list[Node], list[tuple[ModelCall, QuarantineReason]]]:
    """Calls as nodes, and the calls that must not be trained on.

    Args:
        calls: the calls of one rollout.
        incomplete: the rollout's record has holes, so nothing of it is admitted.
    """
    copies = Counter(call.call_id for call in calls)
    nodes: list[Node] = []
    kept_out: list[tuple[ModelCall, QuarantineReason]] = []
    for call in calls:
        if incomplete:
            kept_out.append((call, "incomplete_rollout"))
        elif copies[call.call_id] > 1:
            kept_out.append((call, "duplicate_call_id"))
        elif isinstance(found := _examine(call), Node):
            nodes.append(found)
        else:
            kept_out.append((call, found))
    return nodes, kept_out


def _examine(call: ModelCall) -> Node | QuarantineReason:
    if call.status == "failed":
        return "failed"
    if call.status == "refused":
        return "refused"
    num_ids = len(call.completion_token_ids)
    if not call.prompt_token_ids or not num_ids:
        return "no_token_ids"
    if len(call.behaviour_logprobs) != num_ids or call.usage.completion_tokens not in (0, num_ids):
        return "length_mismatch"
    logprobs = np.array(call.behaviour_logprobs, dtype=np.float64)
    if not np.all((logprobs > _VLLM_LOGPROB_FLOOR) & (logprobs <= 0.0)):
        return "bad_logprob"
    try:
        ids = np.array([*call.prompt_token_ids, *call.completion_token_ids], dtype=np.int32)
    except OverflowError:
        return "bad_token_id"
    if (ids < 0).any():
        return "bad_token_id"
    return Node(call, ids, len(call.prompt_token_ids), logprobs.astype(np.float32))
