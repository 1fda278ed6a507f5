"""What `polar-mitm rl` is told: a TOML file, one table per part. Every key has its default beside it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_mitm.cli.exits import fail
from polar_mitm_trainer.config import (
    AdvantageConfig,
    LossConfig,
    OptimiserConfig,
    PackingConfig,
    PolicyConfig,
    TrainConfig,
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineConfig(_Part):
    """`model`: started for this run and stopped with it. `url`: one that runs, on the same folders."""

    model: str | None = None
    url: str | None = None
    dtype: str | None = None  # as the learner's, so that both agree to rounding
    max_model_len: int | None = Field(default=None, ge=1)
    tool_call_parser: str = "hermes"
    extra: tuple[str, ...] = ()  # further options for vLLM
    keep: bool = False  # leave it running

    @model_validator(mode="after")
    def _one(self) -> EngineConfig:
        if (self.model is None) == (self.url is None):
            raise ValueError("give either model, to have an engine started, or the url of one")
        return self


class RolloutsConfig(_Part):
    """Who does what, how often, and for how long."""

    tasks: str  # FILE.py, FILE.py:FUNCTION or a folder (polar_mitm.tasks)
    harness: str = "pi"
    arguments: tuple[str, ...] = ()  # further ones for the harness
    split: str = "train"
    group_size: int = Field(default=8, ge=1)  # rollouts of one task
    groups_per_step: int = Field(default=4, ge=1)
    concurrency: int = Field(default=8, ge=1)  # rollouts at once
    timeout_s: float = Field(default=300.0, gt=0)
    max_tokens: int | None = Field(default=None, ge=1)  # sampled per call
    builder: Literal["forest", "per-request"] = "forest"
    settings: dict[str, Any] = {}  # of the capture (polar_mitm/config.py)


class SyncConfig(_Part):
    """How new weights meet rollouts.

    "on_policy": no rollout runs while weights change. "async": rollouts go on meanwhile, with groups at most
    `max_staleness` steps older than the step that trains them; older ones are dropped, and counted.
    """

    mode: Literal["on_policy", "async"] = "on_policy"
    max_staleness: int = Field(default=1, ge=0)
    every: int = Field(default=1, ge=1)  # steps between updates of the engine
    via: Literal["folder", "transfer"] = "folder"  # "transfer": out of the learner's GPU memory, on its GPU
    verify: bool = True  # the engine's logprobs against the learner's, after each update
    tolerance: float | None = Field(default=None, gt=0)  # nats; 0.005 in float32, else 0.3


class EvaluationConfig(_Part):
    """Tasks that are never trained on, each done `samples` times."""

    split: str = "test"
    num_tasks: int = Field(default=0, ge=0)  # 0: none
    samples: int = Field(default=1, ge=1)
    before: bool = True
    after: bool = True
    every: int = Field(default=0, ge=0)  # steps; 0: only before and after


class CheckpointConfig(_Part):
    """`checkpoints/step-N` in the run's folder; the last one is always written."""

    every: int = Field(default=10, ge=0)  # steps; 0: only the last
    keep_last: int = Field(default=2, ge=1)


class RlConfig(_Part):
    """A whole run."""

    name: str = ""
    out: Path
    steps: int = Field(ge=1)
    seed: int = 0
    num_processes: int = Field(default=1, ge=1)  # of the learner; more go through torchrun
    engine: EngineConfig
    rollouts: RolloutsConfig
    policy: PolicyConfig
    optimiser: OptimiserConfig = OptimiserConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    packing: PackingConfig = PackingConfig()
    reference: Path | None = None
    sync: SyncConfig = SyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="before")
    @classmethod
    def _same_model(cls, given: Any) -> Any:
        """The learner begins with the engine's model unless it is told another."""
        match given:
            case {"engine": {"model": str(model), **rest}} if "url" not in rest:
                policy = given.get("policy", {})
                if not isinstance(policy, dict):
                    return given  # which is said of it below
                if policy.get("model", model) != model:
                    raise ValueError("engine.model and policy.model differ: a run begins with one model")
                return {**given, "policy": {"model": model, **policy}}
        return given

    @model_validator(mode="after")
    def _sense(self) -> RlConfig:
        check_loss(self.loss)
        if self.loss.name == "sft":
            raise ValueError("loss.name: sft is for recorded rollouts (`polar-mitm sft`)")
        if self.loss.max_staleness is not None:
            raise ValueError("loss.max_staleness: sync.max_staleness is what bounds it here")
        if self.sync.via == "transfer" and (self.policy.lora or self.num_processes > 1):
            raise ValueError("sync.via: transfer is for all weights of a learner in one process")
        if self.rollouts.group_size < 2:
            raise ValueError(
                "rollouts.group_size: a group of one has nothing to be compared with; give 2 or more"
            )
        if self.sync.mode == "on_policy" and self.sync.every != 1:
            raise ValueError("sync.every: on_policy means an update after each step")
        if self.sync.mode == "async" and self.sync.every > self.sync.max_staleness + 1:
            raise ValueError("sync.every: more than max_staleness + 1 leaves nothing that is fresh enough")
        return self

    @property
    def max_staleness(self) -> int:
        """Steps by which weights that sampled may be behind those that learn from it."""
        return 0 if self.sync.mode == "on_policy" else self.sync.max_staleness

    @property
    def tolerance(self) -> float:
        """Nats by which engine and learner may differ on the same weights."""
        if self.sync.tolerance is not None:
            return self.sync.tolerance
        return 0.005 if self.policy.dtype == "float32" == self.engine_dtype else 0.3

    @property
    def engine_dtype(self) -> str:
        """Of the engine's weights."""
        return self.engine.dtype or str(self.policy.dtype)

    @property
    def train(self) -> TrainConfig:
        """What the learner is told."""
        loss = self.loss.model_copy(update={"max_staleness": self.max_staleness})
        return TrainConfig(
            policy=self.policy,
            optimiser=self.optimiser,
            advantage=self.advantage,
            loss=loss,
            packing=self.packing,
            reference=self.reference,
            seed=self.seed,
        )


def check_loss(loss: LossConfig) -> None:
    """Raises ValueError where a loss lacks what it needs."""
    from polar_mitm_trainer.loss_defaults import resolve

    if resolve(loss).aggregation == "constant" and loss.constant is None:
        raise ValueError(f"loss.constant: {loss.name} divides by a length; give one, such as 1024")
    if loss.overlong == "shape" and None in (loss.overlong_length, loss.overlong_buffer):
        raise ValueError("loss.overlong: shape needs overlong_length and overlong_buffer")


def load_toml(path: Path) -> dict[str, Any]:
    """A TOML file, or the end of the command with what is wrong."""
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{path} is not TOML: {error}")
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")


def validated(model: type[Any], given: dict[str, Any], source: object) -> Any:
    """`given` as a configuration, or the end of the command with each key that is wrong."""
    try:
        return model.model_validate(given)
    except pydantic.ValidationError as error:
        complaints = (_complaint(model, each) for each in error.errors())
        fail(f"{source}: {'; '.join(complaints)}")


def _complaint(model: Any, error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        said = error["msg"].removeprefix("Value error, ")
        return f"{name}: {said}" if name else said
    for part in error["loc"][:-1]:
        model = getattr(model, "model_fields", {}).get(part)
        model = getattr(model, "annotation", None)
    known = ", ".join(getattr(model, "model_fields", {}))
    return f"there is no key {name}" + (f": there are {known}" if known else "")
