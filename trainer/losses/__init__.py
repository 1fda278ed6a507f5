"""The losses by name: `LOSSES[name](tokens, config) -> LossOutput`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from polar_mitm_trainer.config import LossConfig, LossName
from polar_mitm_trainer.losses.base import policy_loss
from polar_mitm_trainer.losses.cispo import cispo
from polar_mitm_trainer.losses.grpo import grpo
from polar_mitm_trainer.losses.gspo import gspo
from polar_mitm_trainer.losses.sft import sft
from polar_mitm_trainer.token_batch import LossOutput, TokenBatch

LOSSES: Mapping[LossName, Callable[[TokenBatch, LossConfig], LossOutput]] = MappingProxyType(
    {
        "grpo": partial(policy_loss, grpo),
        "dr_grpo": partial(policy_loss, grpo),
        "dapo": partial(policy_loss, grpo),
        "gspo": partial(policy_loss, gspo),
        "cispo": partial(policy_loss, cispo),
        "sft": partial(policy_loss, sft),
    }
)

__all__ = ["LOSSES", "LossOutput", "TokenBatch"]
