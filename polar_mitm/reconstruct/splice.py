"""Polar's rule, for comparison: chains by prompt, spliced behind each end of turn, and what that costs.

The rule, as the builder `prefix_merging` of NVIDIA-NeMo/ProRL-Agent-Server has it: a call joins the chain
whose newest prompt is the longest prefix of its own. A chain becomes the first prompt, its sampled ids, and
for each later call what its prompt has after the first end-of-turn id behind the previous prompt, and its
sampled ids. The end-of-turn id is the last one that the chain's first naturally ended call sampled. Where
it is not found, the rest of the chain is dropped.

Nothing there compares the context that a token trains under with the one that it was sampled under: here
that is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polar_mitm.columns import RolloutColumns
from polar_mitm.reconstruct.assemble import Piece, assemble
from polar_mitm.reconstruct.records import MaskReason, Trajectory
from polar_mitm.reconstruct.tokens import Tokens

_NATURAL_ENDS = ("stop", "tool_calls")
_Ids = NDArray[np.int32]


def splice(
    columns: RolloutColumns,
    tokens: Tokens,
    rows: Sequence[int],
    masked: dict[int, MaskReason],
    group_id: str | None,
) -> tuple[list[Trajectory], int]:
    """A trajectory per chain, and how many trained tokens have another context than they were sampled under.

    Args:
        rows: the admitted calls, in the order in which they join chains.
        masked: rows that train nowhere; those that the rule loses are added.
    """
    chains: list[list[int]] = []
    tips: list[_Ids] = []
    for row in rows:
        prompt = _prompt(tokens, row)
        found = [i for i, tip in enumerate(tips) if _starts_with(prompt, tip)]
        if found:
            longest = max(found, key=lambda i: tips[i].size)
            chains[longest].append(row)
            tips[longest] = prompt
        else:
            chains.append([row])
            tips.append(prompt)
    trajectories, mismatched = [], 0
    for chain in chains:
        ids, pieces, wrong = _merge(columns, tokens, chain, masked)
        trajectories.append(assemble(columns, ids, pieces, group_id))
        mismatched += wrong
    return trajectories, mismatched


def _merge(
    columns: RolloutColumns, tokens: Tokens, chain: Sequence[int], masked: dict[int, MaskReason]
) -> tuple[_Ids, list[Piece], int]:
    end_of_turn = next(
        (int(_sampled(tokens, row)[-1]) for row in chain if columns.finish_reason[row] in _NATURAL_ENDS), None
    )
    stream: list[_Ids] = []
    size = mismatched = 0
    pieces: list[Piece] = []
    previous: int | None = None
    for i, row in enumerate(chain):
        prompt, sampled = _prompt(tokens, row), _sampled(tokens, row)
        if previous is None:
            stream.append(prompt)
        else:
            tail = prompt[tokens.num_prompt[previous] :]
            ends = np.flatnonzero(tail == end_of_turn) if end_of_turn is not None else np.empty(0, np.int64)
            if not ends.size:
                for lost in chain[i:]:
                    masked.setdefault(lost, "dropped")
                break
            closed = _sampled(tokens, previous)[-1] == end_of_turn
            stream.append(tail[int(ends[0]) + int(closed) :])
        size += stream[-1].size
        reason = masked.get(row)
        if reason is None and not np.array_equal(np.concatenate(stream), prompt):
            mismatched += sampled.size
        stream.append(sampled)
        pieces.append((row, size, size + sampled.size, reason))
        size += sampled.size
        previous = row
    return np.concatenate(stream), pieces, mismatched


def _prompt(tokens: Tokens, row: int) -> _Ids:
    return tokens.ids(row)[: tokens.num_prompt[row]]


def _sampled(tokens: Tokens, row: int) -> _Ids:
    return tokens.ids(row)[tokens.num_prompt[row] :]


def _starts_with(ids: _Ids, head: _Ids) -> bool:
    return head.size <= ids.size and np.array_equal(ids[: head.size], head)
