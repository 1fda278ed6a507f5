"""CISPO: a clipped importance weight times the logprob: no token loses its gradient (arXiv 2506.13585)."""

from __future__ import annotations

from torch import Tensor

from polar_mitm_trainer.losses.base import Terms
from polar_mitm_trainer.token_batch import TokenBatch


def cispo(tokens: TokenBatch, log_ratio: Tensor, least: float, most: float) -> Terms:
    """-clipped ratio x advantage x logprob [M], with gradient by the logprob alone."""
    ratio = log_ratio.detach().exp()
    terms = -ratio.clamp(least, most) * tokens.advantages * tokens.logprobs
    return Terms(terms, ratio, ratio < least, ratio > most)
