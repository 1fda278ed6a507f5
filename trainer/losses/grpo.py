"""PPO's clipped surrogate: GRPO (arXiv 2402.03300), and Dr. GRPO (2503.20783) and DAPO (2503.14476).

The three differ in what `loss_defaults` says of them: how tokens are weighed, and DAPO clips higher up.
"""

from __future__ import annotations

from torch import Tensor

from polar_mitm_trainer.losses.base import Terms
from polar_mitm_trainer.token_batch import TokenBatch


def clipped_surrogate(ratio: Tensor, advantages: Tensor, least: float, most: float) -> Terms:
    """-min(ratio x advantage, clipped ratio x advantage) [M]. Clipped is what has no gradient by it."""
    terms = -(ratio * advantages).minimum(ratio.clamp(least, most) * advantages)
    return Terms(terms, ratio, (ratio < least) & (advantages < 0), (ratio > most) & (advantages > 0))


def grpo(tokens: TokenBatch, log_ratio: Tensor, least: float, most: float) -> Terms:
    """Each token's own ratio, clipped."""
    return clipped_surrogate(log_ratio.exp(), tokens.advantages, least, most)
