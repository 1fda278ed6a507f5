"""Logprobs of target ids from hidden states, with never more than a chunk of the logits in memory.

M positions, H hidden size, V vocabulary. Logits and softmax are float32 whatever the weights are (float64 for
float64), since bfloat16 ones bias the ratios that a policy loss is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """What makes logits of a hidden state: `softcap` x tanh(`scale` x (`module` of it) / `softcap`)."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a Hugging Face causal LM, with what its architecture does to logits.

        Known are Gemma's soft cap, Cohere's factor and Granite's divisor.
        """
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))


def token_logprobs(
    hidden: Tensor, targets: Tensor, head: Head, *, chunk: int, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logprobs [M] in nats of `targets` [M] int64 under `hidden` [M, H], and entropies [M] without gradient.

    At most `chunk` rows of logits exist at once, in the backward pass too, which computes them again.
    A head that is not a plain linear layer (one with an adapter) is called: its logits are of its own type,
    and several copies of a chunk of them exist.
    """
    linear = head.module
    if type(linear) is nn.Linear:
        weight = linear.weight.to(hidden.dtype)
        logprobs, entropy = _LinearLogprobs.apply(
            hidden, weight, linear.bias, targets, head, chunk, with_entropy
        )
        return logprobs, entropy if with_entropy else None
    parts = [
        checkpoint(_called, hidden[rows], targets[rows], head, with_entropy, use_reentrant=False)
        for rows in _chunks(len(targets), chunk)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _chunks(num: int, chunk: int) -> Iterator[slice]:
    """At least one, so that nothing is still a tensor with a gradient."""
    return (slice(start, start + chunk) for start in range(0, max(num, 1), chunk))


def _called(hidden: Tensor, targets: Tensor, head: Head, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """One chunk, with autograd."""
    logits = head.module(hidden)
    logits = _shaped(logits.to(_precise(logits)), head)
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(1, targets[:, None])[:, 0]
    if not with_entropy:
        return picked, None
    with torch.no_grad():
        return picked, -(logprobs.exp() * logprobs).sum(-1)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _shaped(logits: Tensor, head: Head) -> Tensor:
    if head.scale != 1.0:
        logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a` @ `b` in `dtype`, summed in it too."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _LinearLogprobs(torch.autograd.Function):
    """Logits of one chunk at a time, forward and again backward; the weight's gradient sums in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = _precise(hidden)
        logprobs = hidden.new_empty(len(targets), dtype=dtype)
        normaliser = torch.empty_like(logprobs)  # [M] log of the sum of exp(logits)
        entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(targets), chunk):
                _score(
                    _logits(hidden[rows], weight, bias, head, dtype),
                    targets[rows],
                    logprobs[rows],
                    normaliser[rows],
                    entropy[rows] if with_entropy else None,
                )
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.head, ctx.chunk = head, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        head, dtype = ctx.head, _precise(hidden)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if of_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if of_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(targets), ctx.chunk):
                logits = _logits(hidden[rows], weight, bias, head, dtype)
                of_logits = _logit_gradients(logits, targets[rows], normaliser[rows], grad[rows], head)
                del logits  # or two chunks of them would exist
                if grad_bias is not None:
                    grad_bias += of_logits.sum(0)
                of_logits = of_logits.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = _product(of_logits, weight, dtype)
                if grad_weight is not None:
                    _add_product(grad_weight, of_logits.T, hidden[rows])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, dtype: torch.dtype) -> Tensor:
    logits = _product(hidden, weight.T, dtype)
    if bias is not None:
        logits += bias
    return _shaped(logits, head)


def _score(
    logits: Tensor, targets: Tensor, logprobs: Tensor, normaliser: Tensor, entropy: Tensor | None
) -> None:
    """Fills in the last three for one chunk."""
    torch.logsumexp(logits, -1, out=normaliser)
    torch.sub(logits.gather(1, targets[:, None])[:, 0], normaliser, out=logprobs)
    if entropy is not None:
        expected = logits.sub(normaliser[:, None]).exp_().mul_(logits).sum(-1)
        torch.sub(normaliser, expected, out=entropy)


def _logit_gradients(logits: Tensor, targets: Tensor, normaliser: Tensor, grad: Tensor, head: Head) -> Tensor:
    """Of one chunk's logits before they are shaped, in their place."""
    slope = None if head.softcap is None else 1.0 - (logits / head.softcap).square()
    result = logits.sub_(normaliser[:, None]).exp_().mul_(-grad[:, None])
    result.scatter_add_(1, targets[:, None], grad[:, None])
    if slope is not None:
        result *= slope
    if head.scale != 1.0:
        result *= head.scale
    return result


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total` += `a` @ `b`, without rounding the product to their type first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
