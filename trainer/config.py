"""What a training run can be told: one model per part, from TOML tables of the same names. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_mitm_trainer.samples import Aggregation

Decay = Annotated[float, Field(ge=0, lt=1)]
LossName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sft"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(_Part):
    """Low-rank adapters instead of all weights (peft)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class PolicyConfig(_Part):
    """The model that learns. `device` "auto" is a GPU where there is one."""

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    attention: Literal["auto", "blocks", "flex"] = "auto"


class OptimiserConfig(_Part):
    """AdamW, with a linear warm-up to a constant rate. Within these bounds an update of float32 is finite."""

    lr: float = Field(default=1e-6, gt=0, le=1)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(default=1e-8, ge=1e-20)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6)
    updates_per_step: int = Field(default=1, ge=1)  # minibatches that a step's rollouts are cut into
    epochs: int = Field(default=1, ge=1)  # passes over a step's rollouts


class AdvantageConfig(_Part):
    """Group-relative, per rollout, before a rollout's advantage goes to its trajectories."""

    std: bool = True  # divide by the group's standard deviation
    leave_one_out: bool = False  # centre on the mean of the others
    invalid_tool_call: float | None = None  # the advantage of a call with malformed tool arguments


class LossConfig(_Part):
    """The loss. What is None is the named loss's own default (`polar_mitm_trainer.losses`)."""

    name: LossName = "grpo"
    clip_low: float | None = Field(default=None, ge=0)
    clip_high: float | None = Field(default=None, ge=0)
    aggregation: Aggregation | None = None
    constant: float | None = Field(default=None, gt=0)  # the length that "constant" divides by
    old_policy: Literal["behaviour", "recomputed"] = "behaviour"
    kl_coefficient: float = Field(default=0.0, ge=0)
    kl_estimator: Literal["k1", "k3"] = "k3"
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    correction_cap: float = Field(default=2.0, gt=0)
    correction_floor: float = Field(default=0.0, ge=0)  # the ratio is bounded below too; 0 is no bound
    overlong: Literal["keep", "mask", "shape"] = "keep"  # rollouts that were cut off; DAPO's shaping
    overlong_length: int | None = Field(default=None, ge=1)  # trained tokens where shaping ends
    overlong_buffer: int | None = Field(default=None, ge=1)  # and how many before it begins
    max_staleness: int | None = Field(default=None, ge=0)  # steps; older tokens are masked, and counted

    @model_validator(mode="after")
    def _corrected_once(self) -> Self:
        if self.old_policy == "behaviour" and self.correction.endswith("truncate"):
            raise ValueError(
                f"correction '{self.correction}' needs old_policy = 'recomputed': a ratio to the engine's "
                "behaviour logprobs holds what it corrects already (masks go with either)"
            )
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.correction_floor > self.correction_cap:
            raise ValueError(
                f"correction_floor {self.correction_floor:g} is above correction_cap {self.correction_cap:g}"
            )
        length, buffer = self.overlong_length, self.overlong_buffer
        if length is not None and buffer is not None and buffer > length:
            raise ValueError(f"overlong_buffer {buffer} is above overlong_length {length}")
        return self


class PackingConfig(_Part):
    """How samples become micro-batches."""

    max_tokens: int = Field(default=16_384, ge=1)  # laid out, so after sharing
    tree: bool = True  # compute what samples share once
    logit_chunk: int = Field(default=1024, ge=1)  # positions whose logits exist at once


class TrainConfig(_Part):
    """Everything that decides what an optimiser step does."""

    policy: PolicyConfig
    optimiser: OptimiserConfig = OptimiserConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    packing: PackingConfig = PackingConfig()
    reference: Path | None = None  # of the KL term; the initial policy by default
    seed: int = 0
