"""GSPO: one ratio per sequence, of its tokens' geometric mean (arXiv 2507.18071)."""

from __future__ import annotations

from torch import Tensor

from polar_mitm_trainer.losses.base import Terms
from polar_mitm_trainer.losses.grpo import clipped_surrogate
from polar_mitm_trainer.token_batch import TokenBatch


def gspo(tokens: TokenBatch, log_ratio: Tensor, least: float, most: float) -> Terms:
    """The paper's GSPO-token: the sequence's ratio as a value, each token's own logprob as gradient.

    Where all tokens of a sequence have one advantage, weight and correction, gradients are GSPO's own.
    """
    lengths = tokens.per_sample(log_ratio.new_ones(()).expand_as(log_ratio)).clamp(min=1.0)
    of_sequence = (tokens.per_sample(log_ratio.detach()) / lengths)[tokens.samples]
    ratio = (log_ratio - log_ratio.detach() + of_sequence).exp()
    return clipped_surrogate(ratio, tokens.advantages, least, most)
