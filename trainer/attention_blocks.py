"""Attention over a forest of tokens, block by block: each node against itself, and all behind it against it.

The softmax of a token goes over its whole path, of which each block is a part. A part comes with the
logarithm of what it sums to (FlashAttention, arXiv 2205.14135), and by these parts are merged. Backward, a
block needs nothing of the others but the merged output and logarithm, so the gradients of the blocks add up.
Nothing is copied per branch: the keys and values of a shared prefix exist once, and all branches behind it
are one stretch of queries.

N tokens, H heads of D numbers, G heads of keys and values, of which H is a multiple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polar_mitm_trainer.attention_kernels import kernel_for
from polar_mitm_trainer.microbatch import Node


def block_attention(nodes: Sequence[Node]) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """The attention of a forest whose `nodes` are as in `MicroBatch`.

    It takes query [1, H, N, D], key and value [1, G, N, D], and what scores are multiplied by, and returns
    [1, H, N, D].
    """
    blocks = list(_blocks(nodes))

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out: Tensor = _Blocks.apply(_dense(query), _dense(key), _dense(value), blocks, scale)  # type: ignore[no-untyped-call]
        return out

    return attend


# Which tokens ask which; whether causally; whether it is the first block of those that ask.
_Block = tuple[slice, slice, bool, bool]


def _blocks(nodes: Sequence[Node]) -> Iterator[_Block]:
    """A node's block with itself comes before those of its descendants with it, and a root's before all."""
    tree_end = 0
    for node in nodes:
        is_root = node.start >= tree_end
        tree_end = max(tree_end, node.subtree_end)
        own = slice(node.start, node.end)
        yield own, own, True, is_root
        if node.subtree_end > node.end:
            yield slice(node.end, node.subtree_end), own, False, is_root


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[_Block], scale: float
    ) -> Tensor:
        forward, _ = kernel_for(query)
        merges = not all(first for *_, first in blocks)
        precise = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty_like(query.transpose(1, 2), dtype=precise if merges else None).transpose(1, 2)
        total = query.new_empty(query.shape[:-1], dtype=precise)
        for asks, asked, causal, first in blocks:
            part, lse = forward(query[:, :, asks], key[:, :, asked], value[:, :, asked], causal, scale)
            so_far, before = out[:, :, asks], total[:, :, asks]
            if first:
                so_far.copy_(part)
                before.copy_(lse)
                continue
            after = torch.logaddexp(before, lse)
            so_far.mul_((before - after).exp_().unsqueeze(-1))
            so_far.addcmul_(part.to(precise), (lse - after).exp_().unsqueeze(-1))
            before.copy_(after)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        _, backward = kernel_for(query)
        grad = _dense(grad)
        grads = [torch.empty_like(each) for each in (query, key, value)]
        for asks, asked, causal, first in ctx.blocks:
            parts = backward(
                grad[:, :, asks],
                query[:, :, asks],
                key[:, :, asked],
                value[:, :, asked],
                out[:, :, asks],
                total[:, :, asks],
                causal,
                ctx.scale,
            )
            places = ((asks, first), (asked, causal), (asked, causal))
            for whole, part, (rows, is_first) in zip(grads, parts, places, strict=True):
                if is_first:
                    whole[:, :, rows].copy_(part)
                else:
                    whole[:, :, rows].add_(part)
        return (*grads, None, None)


def _dense(tensor: Tensor) -> Tensor:
    """The kernels want the last dimension without gaps."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
