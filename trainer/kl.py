"""How far the learner is from a reference, estimated on its own samples (joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

_MOST = 20.0  # nats: keeps k3 finite


def kl_terms(logprobs: Tensor, reference: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """KL(learner || reference) per token [M] in nats, of `logprobs` [M] (with gradient) and `reference` [M].

    "k3": r - 1 - log r of r = reference / learner, and that function's gradient (GRPO, arXiv 2402.03300).
    "k1": the log ratio, whose own gradient is zero on average and so pulls nowhere; the gradient here is that
    of its square's half, which on average is the KL's (arXiv 2510.01555).
    """
    log_ratio = logprobs - reference
    if estimator == "k1":
        half_square = log_ratio.square() / 2
        return log_ratio.detach() + half_square - half_square.detach()
    clamped = log_ratio.clamp(-_MOST, _MOST)
    return (-clamped).exp() - 1.0 + clamped
