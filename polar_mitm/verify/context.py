"""Context equality: is each token trained under the ids that it was sampled under? No engine is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from polar_mitm.verify.records import Path, Sampled

What = Literal["prompt", "completion", "logprob", "loss_mask", "trained_twice", "missing_call"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a trajectory and the engine's own report of a call differ.

    `position` counts tokens from the trajectory's start. `recorded` is what the engine reported there,
    `found` what the trajectory says; None past the end of one of them.
    """

    trajectory_id: str
    call_id: str
    what: What
    position: int
    recorded: float | None
    found: float | None


def differences(path: Path, calls: Mapping[str, Sampled]) -> list[Difference]:
    """At most one difference for each call of a trajectory, in its order, and one for tokens of none.

    Compared are prompt ids with all ids before the sampled span, sampled ids with the span, and, where the
    span trains, its behaviour logprobs (as float32) and loss mask.
    """
    found = [_difference(path, span, calls.get(span.call_id)) for span in path.spans]
    found.append(_stray(path))
    return [each for each in found if each is not None]


def _difference(path: Path, span: Any, call: Sampled | None) -> Difference | None:
    def difference(what: What, start: int, recorded: NDArray[Any], found: NDArray[Any]) -> Difference | None:
        at = first_difference(recorded, found)
        if at is None:
            return None
        return Difference(
            path.trajectory_id, span.call_id, what, start + at, _value(recorded, at), _value(found, at)
        )

    if call is None:
        return Difference(path.trajectory_id, span.call_id, "missing_call", span.sampled_start, None, None)
    start, sampled = span.sampled_start, slice(span.sampled_start, span.end)
    found = difference("prompt", 0, call.prompt_ids, path.token_ids[:start])
    found = found or difference("completion", start, call.completion_ids, path.token_ids[sampled])
    if found is None and span.mask_reason is None:
        logprobs = call.logprobs.astype(np.float32)
        found = difference("logprob", start, logprobs, path.behaviour_logprobs[sampled])
        trains = np.ones(call.completion_ids.size, dtype=np.uint8)
        found = found or difference("loss_mask", start, trains, path.loss_mask[sampled])
    return found


def first_difference(one: NDArray[Any], other: NDArray[Any]) -> int | None:
    """Where two arrays begin to differ, in length too; None where they are equal."""
    shared = min(one.size, other.size)
    differs = one[:shared] != other[:shared]
    if differs.any():
        return int(np.argmax(differs))
    return None if one.size == other.size else shared


def _value(array: NDArray[Any], at: int) -> float | None:
    return array[at].item() if at < array.size else None


def _stray(path: Path) -> Difference | None:
    """A token that the loss mask trains though no span says so."""
    rest = path.loss_mask.copy()
    for span in path.spans:
        if span.mask_reason is None:
            rest[span.sampled_start : span.end] = 0
    if not rest.any():
        return None
    at = int(np.argmax(rest))
    return Difference(path.trajectory_id, "", "loss_mask", at, 0, rest[at].item())
