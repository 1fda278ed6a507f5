"""One forward pass: some samples laid out as a forest of tokens, and which hidden state predicts what.

N tokens laid out, M trained tokens, S samples, K nodes of the forest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A run of tokens without a fork, at `start : end`; all that descends from it is at `end : subtree_end`.

    Nodes lie in depth-first order. A sequence that shares nothing is a root without descendants.
    """

    start: int
    end: int
    subtree_end: int


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A forest of tokens. A token sees itself, those before it in its node, and its node's ancestors.

    `token_ids` [N] int64; `position_ids` [N] int64, the depth of each token. The hidden state at `sources`
    [M] int64 predicts `targets` [M] int64 (ids); where branches part, one state predicts several targets.
    `samples` [M] int64 says whose token it is, 0..S-1. `behaviour_logprobs`, `advantages`, `weights` [M]
    float32 as in `Sample`. Of one sample they come in its own order, and its tokens are all here.
    `sample_indices` [S]: which of the samples that were packed each is. `num_unpacked` is what the samples
    would take laid out one by one.
    """

    token_ids: Tensor
    position_ids: Tensor
    nodes: tuple[Node, ...]
    sources: Tensor
    targets: Tensor
    samples: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    num_samples: int
    num_unpacked: int
    sample_indices: tuple[int, ...]

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in ((name, getattr(self, name)) for name in self.__slots__)
        }
        return MicroBatch(**moved)
