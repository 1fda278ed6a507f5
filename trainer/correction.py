"""The engine that sampled and the learner that scores disagree a little on the same weights. By how much?"""

from __future__ import annotations

import torch
from torch import Tensor

from polar_mitm_trainer.config import LossConfig
from polar_mitm_trainer.token_batch import TokenBatch

_MOST = 20.0  # nats: keeps what is reported finite


@torch.no_grad()
def correct(tokens: TokenBatch, mismatch: Tensor, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """What each token's term is multiplied by [M], and metrics [M]. No gradient goes through either.

    `mismatch` [M] is the learner's logprob minus the engine's. A ratio learner / engine, of each token or of
    a whole sample ("sequence_"), is cut to [`correction_floor`, `correction_cap`] (truncated importance
    sampling) or makes its tokens weigh nothing where it is outside ("_mask", IcePop). That ratio multiplies,
    unless the loss's own ratio is to the engine and so holds it already: then only masks act.
    """
    low, high = config.correction_floor, config.correction_cap
    ratio = mismatch.clamp(max=_MOST).exp()
    metrics = {
        "mismatch_abs": mismatch.abs(),
        "mismatch_k1": -mismatch,  # of KL(engine || learner), on the engine's samples
        "mismatch_k3": ratio - 1.0 - mismatch,
        "mismatch_outside": (ratio > high) | (ratio < low),
    }
    if config.correction.startswith("sequence"):
        ratio = tokens.per_sample(mismatch).exp()[tokens.samples]
    outside = (ratio > high) | (ratio < low)
    if config.correction == "none":
        factor = torch.ones_like(mismatch)
    elif config.correction.endswith("truncate"):
        factor = ratio.clamp(low, high)
    else:
        factor = torch.where(outside, 0.0, 1.0 if config.old_policy == "behaviour" else ratio)
    if config.correction != "none":
        metrics |= {"correction": factor, "corrected": outside}
    return factor, metrics
