"""Attention over a forest of tokens, block by block: each node against itself, and all behind it against it.

The softmax of a token goes over its whole path, of which each block is a part: parts come with the logarithm of
what they sum to (FlashAttention, arXiv 2205.14135), by which they are merged. Backward, a block needs nothing of
the others but the merged output and logarithm, so that the gradients of the blocks just add. Nothing is
copied per branch: the keys and values of a shared prefix exist once, and all branches behind it are one
stretch of queries.

Shapes: query [1, H, N, D], key and value [1, G, N, D] with H a multiple of G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from polar_mitm_trainer.microbatch import Node

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, nodes: Sequence[Node], scale: float) -> Tensor:
    """The attention output [1, H, N, D]; `nodes` as in `MicroBatch`, `scale` is what scores are multiplied by."""
    out: Tensor = _Blocks.apply(query, key, value, tuple(nodes), scale)
    return out


def _blocks(nodes: Sequence[Node]) -> Iterator[tuple[slice, slice, bool]]:
    """Which tokens ask which, and whether causally. A token's first block is its root's."""
    for node in nodes:
        own = slice(node.start, node.end)
        yield own, own, True
        if node.subtree_end > node.end:
            yield slice(node.end, node.subtree_end), own, False


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, nodes: Sequence[Node], scale: float
    ) -> Tensor:
        merged = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
        out = query.new_empty(query.shape, dtype=merged)
        total = query.new_full(query.shape[:-1], -torch.inf, dtype=merged)
        for asks, asked, causal in _blocks(nodes):
            part, lse = _forward(
                query[:, :, asks], key[:, :, asked], value[:, :, asked], 0.0, causal, scale=scale
            )
            before = total[:, :, asks]
            after = torch.logaddexp(before, lse)
            keep = (before - after).exp().unsqueeze(-1)
            o = out[:, :, asks]
            o.copy_(torch.where(keep > 0, o * keep, 0) + part * (lse - after).exp().unsqueeze(-1))
            before.copy_(after)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.nodes, ctx.scale = nodes, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        (grad,) = grads
        dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
        for asks, asked, causal in _blocks(ctx.nodes):
            q, k, v = _backward(
                grad[:, :, asks],
                query[:, :, asks],
                key[:, :, asked],
                value[:, :, asked],
                out[:, :, asks],
                total[:, :, asks],
                0.0,
                causal,
                scale=ctx.scale,
            )
            dq[:, :, asks] += q
            dk[:, :, asked] += k
            dv[:, :, asked] += v
        return dq, dk, dv, None, None
