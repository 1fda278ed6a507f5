"""Drift: the logprob of a sampled token scored again, less the one that the engine gave it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Drift:
    """Drift over `num_tokens` sampled tokens, in nats.

    `max` and `mean` are of |scored - recorded|, `bias` is the mean with its sign. `kl` estimates
    KL(sampled under || scored under) per token, from `num_kl_tokens` of them, with Schulman's k3: with
    r = p_scored/p_recorded the mean of (r - 1) - log r, unbiased and never negative where tokens were sampled
    from the recorded distribution (J. Schulman, "Approximating KL Divergence", 2020,
    joschu.net/blog/kl-approx.html); so tempered calls are left out of it. None: nothing to estimate from.
    """

    num_tokens: int = 0
    max: float = 0.0
    mean: float = 0.0
    bias: float = 0.0
    kl: float | None = None
    num_kl_tokens: int = 0

    @classmethod
    def of(cls, scored: NDArray[np.float64], recorded: NDArray[np.float64], tempered: bool = False) -> Drift:
        """Of one call: its logprobs [C] scored again, and as recorded; all finite, C > 0."""
        difference = scored - recorded
        size = np.abs(difference)
        return cls(
            num_tokens=difference.size,
            max=float(size.max()),
            mean=float(size.mean()),
            bias=float(difference.mean()),
            kl=None if tempered else float(np.mean(np.expm1(difference) - difference)),
            num_kl_tokens=0 if tempered else difference.size,
        )

    def __add__(self, other: Drift) -> Drift:
        """Over the tokens of both."""
        num, kl_num = self.num_tokens + other.num_tokens, self.num_kl_tokens + other.num_kl_tokens

        def mean(one: float, two: float) -> float:
            return (one * self.num_tokens + two * other.num_tokens) / num if num else 0.0

        summed = (self.kl or 0.0) * self.num_kl_tokens + (other.kl or 0.0) * other.num_kl_tokens
        return Drift(
            num_tokens=num,
            max=max(self.max, other.max),
            mean=mean(self.mean, other.mean),
            bias=mean(self.bias, other.bias),
            kl=summed / kl_num if kl_num else None,
            num_kl_tokens=kl_num,
        )
