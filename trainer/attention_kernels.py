"""Attention of some tokens over some others: output, logarithm of what the softmax sums, and gradients.

The backward functions take an output and a logarithm (lse) that may be those of a softmax over more keys than
these: all they make of them is exp(score - lse) and rowsum(grad x out). PyTorch's ring attention
(torch.distributed.tensor.experimental) rests on the same property of the same operators.

Shapes: query, out, grad [1, H, Q, D]; key, value [1, G, K, D]; lse [1, H, Q]. Causal means Q = K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]
]
_ROWS = 1024  # of scores that the plain kernel has in memory at once


def kernel_for(query: Tensor) -> tuple[Forward, Backward]:
    """The fastest pair for tensors like `query`."""
    if query.device.type == "cpu":
        return cpu_forward, cpu_backward
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0:
        return cuda_forward, cuda_backward
    return plain_forward, plain_backward


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Any floating type, float64 too."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu_forward`."""
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return dq, dk, dv


def cuda_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """bfloat16 and float16."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cuda_forward`."""
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is off
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        seed,
        seed,
        scale=scale,
    )
    return dq, dk, dv


def plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Matrix products, on any device and in any type."""
    outs, lses = [], []
    for start in range(0, q.shape[2], _ROWS):
        scores, keys = _scores(q, k, start, causal, scale)
        lse = scores.logsumexp(-1)
        shares = (scores - lse.unsqueeze(-1)).exp_().to(v.dtype)
        outs.append((shares @ v[:, :, None, :keys]).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `plain_forward`."""
    dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[2], _ROWS):
        rows = slice(start, start + _ROWS)
        scores, keys = _scores(q, k, start, causal, scale)
        g, o, asked = (_grouped(each[:, :, rows], k) for each in (grad, out, q))
        shares = (scores - _grouped(lse[:, :, rows], k).unsqueeze(-1)).exp_().to(v.dtype)
        dv[:, :, :keys] += (shares.mT @ g).sum(2)
        of_scores = shares * (g @ v[:, :, None, :keys].mT - (g * o).sum(-1, keepdim=True)) * scale
        dqs.append((of_scores @ k[:, :, None, :keys]).flatten(1, 2))
        dk[:, :, :keys] += (of_scores.mT @ asked).sum(2)
    return torch.cat(dqs, 2), dk, dv


def _scores(q: Tensor, k: Tensor, start: int, causal: bool, scale: float) -> tuple[Tensor, int]:
    """Scores [1, G, H / G, rows, keys], float32 at least, of the rows from `start`; over how many keys."""
    rows = _grouped(q[:, :, start : start + _ROWS], k)
    keys = start + rows.shape[3] if causal else k.shape[2]
    scores = (rows @ k[:, :, None, :keys].mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if causal:
        row = torch.arange(start, keys, device=q.device)
        scores.masked_fill_(torch.arange(keys, device=q.device) > row[:, None], -torch.inf)
    return scores, keys


def _grouped(heads: Tensor, key: Tensor) -> Tensor:
    """[1, H, ...] as [1, G, H / G, ...]."""
    return heads.reshape(1, key.shape[1], -1, *heads.shape[2:])
