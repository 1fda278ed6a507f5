"""Attention over a forest of tokens by PyTorch's flex attention (arXiv 2412.05496), compiled on a GPU.

In depth-first order a token is seen by exactly those from itself to the end of its node's subtree. The sparse
block mask is made of these ends, without ever asking the N x N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from polar_mitm_trainer.microbatch import Node

_BLOCK = 128


def flex_attention_over(
    nodes: Sequence[Node], device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """As `block_attention`, of which it is another implementation."""
    mask = block_mask(nodes, device)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        run: Any = _compiled() if query.is_cuda else flex_attention
        out: Tensor = run(
            query,
            key,
            value,
            block_mask=mask,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out

    return attend


def block_mask(nodes: Sequence[Node], device: torch.device) -> BlockMask:
    """Which blocks of 128 x 128 tokens hold a pair that sees, and which of those hold no other."""
    size = max(node.end for node in nodes)
    ends = np.repeat([node.subtree_end for node in nodes], [node.end - node.start for node in nodes])
    num = -(-size // _BLOCK)
    first = np.arange(num) * _BLOCK
    last = np.minimum(first + _BLOCK, size) - 1
    furthest = np.maximum.reduceat(ends, first)
    nearest = np.minimum.reduceat(ends, first)
    some = (first <= last[:, None]) & (furthest > first[:, None])  # [of queries, of keys]
    every = (last <= first[:, None]) & (nearest > last[:, None])
    every[:, -1] &= size % _BLOCK == 0  # the last block is not whole
    every[-1] &= size % _BLOCK == 0

    exits = torch.from_numpy(ends).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query < exits[key])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~every, device),
        *_listed(every, device),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(size, size),
    )


def _listed(blocks: np.ndarray[Any, np.dtype[np.bool_]], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks each row has [1, 1, rows], and which [1, 1, rows, columns], those first."""
    counts = blocks.sum(1, dtype=np.int32)
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled
