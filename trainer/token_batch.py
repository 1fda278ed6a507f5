"""What a loss is given and what it returns. M trained tokens of one micro-batch, S samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """The trained tokens of some whole samples: a sample's tokens are never in two micro-batches.

    `logprobs` [M] are the learner's, in nats, float32, with gradient. `behaviour_logprobs`, `advantages` and
    `weights` [M] are as in `Sample`; `samples` [M] int64 says whose a token is, 0..`num_samples` - 1.
    `old_logprobs` [M] are the learner's own before the first update on these tokens; None says that this is
    the first. `reference_logprobs` [M] are those of the KL term, `entropy` [M] the learner's in nats.
    """

    logprobs: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    samples: Tensor
    num_samples: int
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    entropy: Tensor | None = None

    def per_sample(self, values: Tensor) -> Tensor:
        """Sums [S] over each sample's tokens of `values` [M]."""
        return values.new_zeros(self.num_samples).index_add(0, self.samples, values)


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """`loss` is a sum of weight x term over tokens: those of micro-batches and of ranks add up to the step's.

    `metrics` are 0-d float64 tensors without gradient, which add up too (`polar_mitm_trainer.metrics`).
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class BadSamplesError(ValueError):
    """Some samples of a batch hold NaN or infinity. `samples` are their numbers in it."""

    def __init__(self, what: str, samples: tuple[int, ...]) -> None:
        super().__init__(f"NaN or infinity in {what} of samples {', '.join(map(str, samples))}")
        self.what = what
        self.samples = samples
