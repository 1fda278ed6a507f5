"""What each loss clips and how it aggregates unless it is told otherwise. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from polar_mitm_trainer.config import LossConfig, LossName
from polar_mitm_trainer.samples import Aggregation


@dataclass(frozen=True, slots=True)
class LossDefaults:
    """The ratio is kept in [1 - `clip_low`, 1 + `clip_high`]; `aggregation` as `samples.weigh` takes it."""

    clip_low: float
    clip_high: float
    aggregation: Aggregation


DEFAULTS: dict[LossName, LossDefaults] = {
    # Where a rollout is one trajectory, "rollout" is what the papers say: each output counts once.
    "grpo": LossDefaults(0.2, 0.2, "rollout"),  # arXiv 2402.03300
    "dr_grpo": LossDefaults(0.2, 0.2, "constant"),  # 2503.20783; needs `constant`
    "dapo": LossDefaults(0.2, 0.28, "token"),  # 2503.14476
    "gspo": LossDefaults(3e-4, 4e-4, "rollout"),  # 2507.18071, section 5.1
    "sft": LossDefaults(0.0, 0.0, "token"),  # clips nothing
    "cispo": LossDefaults(1.0, 4.0, "token"),  # 2506.13585 leaves low open; at most 5 as in 2510.13786
}


def resolve(config: LossConfig) -> LossConfig:
    """The configuration with the named loss's defaults where it says None. Twice is as good as once."""
    default = DEFAULTS[config.name]
    return config.model_copy(
        update={
            "clip_low": default.clip_low if config.clip_low is None else config.clip_low,
            "clip_high": default.clip_high if config.clip_high is None else config.clip_high,
            "aggregation": config.aggregation or default.aggregation,
        }
    )
