"""What all losses share: the ratio to the old policy, corrections, the KL term, the weighted sum, metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polar_mitm_trainer.config import LossConfig
from polar_mitm_trainer.correction import correct
from polar_mitm_trainer.kl import kl_terms
from polar_mitm_trainer.loss_defaults import resolve
from polar_mitm_trainer.token_batch import BadSamplesError, LossOutput, TokenBatch

_MOST = 20.0  # nats: a ratio beyond exp(20) is as good as that, and stays finite
_NUMBERS = (
    "logprobs", "old_logprobs", "behaviour_logprobs", "reference_logprobs", "advantages", "weights",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """A loss before it is weighted, all [M]: `terms` with gradient; `ratio`; which ratios were clipped."""

    terms: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


Objective = Callable[[TokenBatch, Tensor, float, float], Terms]
"""Of the tokens, their log ratios [M] to the old policy (with gradient), and the least and largest ratio."""


def policy_loss(objective: Objective, tokens: TokenBatch, config: LossConfig) -> LossOutput:
    """Sum of weight x (correction x term + coefficient x KL) over tokens, and what to report.

    The old policy is the engine's, or the learner's before the first update, as `config.old_policy` says.

    Raises:
        BadSamplesError: NaN or infinity in what came in; it says in which samples.
        ValueError: a KL term without reference logprobs.
    """
    config = resolve(config)
    assert config.clip_low is not None and config.clip_high is not None
    refuse_non_finite(tokens)
    learner = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    old = tokens.behaviour_logprobs if config.old_policy == "behaviour" else learner
    log_ratio = (tokens.logprobs - old).clamp(-_MOST, _MOST)
    found = objective(tokens, log_ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    factor, metrics = correct(tokens, learner - tokens.behaviour_logprobs, config)
    terms = found.terms * factor
    if tokens.reference_logprobs is not None:
        kl = kl_terms(tokens.logprobs, tokens.reference_logprobs, config.kl_estimator)
        metrics["kl"] = kl.detach()
        terms = terms + config.kl_coefficient * kl
    elif config.kl_coefficient:
        raise ValueError("a KL term needs the reference's logprobs")

    ratio = found.ratio.detach()
    metrics |= {"ratio": ratio, "clipped_low": found.clipped_low, "clipped_high": found.clipped_high}
    if tokens.entropy is not None:
        metrics["entropy"] = tokens.entropy.detach()
    sums = {name: value.sum(dtype=torch.float64) for name, value in metrics.items()}
    for name, value in (("ratio_max", ratio), ("mismatch_abs_max", metrics["mismatch_abs"])):
        sums[name] = value.amax().double() if value.numel() else value.new_zeros((), dtype=torch.float64)
    sums["num_tokens"] = sums["ratio"].new_tensor(ratio.numel())
    return LossOutput((tokens.weights * terms).sum(), sums)


def refuse_non_finite(tokens: TokenBatch) -> None:
    """Raises BadSamplesError, before anything is learned from them."""
    fields = {name: value.detach() for name in _NUMBERS if (value := getattr(tokens, name)) is not None}
    bad = ~torch.stack(list(fields.values())).isfinite()  # [fields, M]
    if bad.any():  # the one time that the device is waited for
        what = ", ".join(name for name, any_bad in zip(fields, bad.any(1).tolist(), strict=True) if any_bad)
        raise BadSamplesError(what, tuple(tokens.samples[bad.any(0)].unique().tolist()))
