"""Supervised fine-tuning on what was sampled and accepted: the negative logprob of each token.

The advantage is its factor: 1 for what was accepted (`polar_mitm_trainer.sft`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polar_mitm_trainer.losses.base import Terms
from polar_mitm_trainer.token_batch import TokenBatch


def sft(tokens: TokenBatch, log_ratio: Tensor, least: float, most: float) -> Terms:
    """-advantage x logprob [M]; no ratio is clipped."""
    never = torch.zeros_like(log_ratio, dtype=torch.bool)
    return Terms(-tokens.advantages * tokens.logprobs, log_ratio.exp(), never, never)
