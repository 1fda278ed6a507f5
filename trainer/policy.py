"""The model that learns: a Hugging Face causal LM, all of it or adapters on it, on packed micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from polar_mitm.errors import SetupError
from polar_mitm_trainer.attention import hidden_states, use_forest_attention
from polar_mitm_trainer.config import LoraConfig, PolicyConfig
from polar_mitm_trainer.distributed import Distributed, whole
from polar_mitm_trainer.logprobs import Head, token_logprobs
from polar_mitm_trainer.microbatch import MicroBatch

_ADAPTER = "default"


class PolicyError(SetupError, ValueError):
    """There is no such model or device, or the model cannot be trained; the message says which and why."""


class Policy(nn.Module):
    """Called with a micro-batch, it gives logprobs. Dropout is off: ratios are those of the weights alone.

    bfloat16: all of the model computes in it but logits and softmax; adapters are float32. What trains has
    a float32 master (`Optimiser`); sharded, the parameters are those masters.

    Args:
        config: `model` is a folder as `save_pretrained` writes it, or a name that is cached or can be had.
        trains: False for a reference; it has no adapters, and no gradient.
        chunk: positions whose logits exist at once.
        seed: of the adapters' weights.

    Raises:
        PolicyError: there is no such model or device, or it does more than this trainer knows.
    """

    def __init__(
        self,
        config: PolicyConfig,
        distributed: Distributed,
        *,
        trains: bool = True,
        chunk: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._chunk = chunk
        self.config = config
        self.device = distributed.device or _device(config)
        dtype = getattr(torch, config.dtype)
        model = _load(config.model, dtype)
        self.model: PreTrainedModel = model
        self.adapters: PeftModel | None = None
        model.requires_grad_(trains and config.lora is None).eval()
        try:
            if trains and config.lora is not None:
                self.adapters = _with_adapters(model, config.lora, seed)
            use_forest_attention(model, config.attention)
        except ValueError as error:
            raise PolicyError(f"{config.model} cannot be trained: {error}") from error
        if trains and config.gradient_checkpointing:
            # The later name is not in all versions of transformers that we run on.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # of the layer alone, for its dropout has to stay off
        self.to(self.device)
        masters_are_parameters = trains and self.adapters is None and distributed.size > 1
        if masters_are_parameters:
            for parameter in model.parameters():
                parameter.data = parameter.data.float()
        names = set(model._no_split_modules or ())
        layers = [each for each in model.modules() if type(each).__name__ in names]
        distributed.shard(self, layers, dtype if masters_are_parameters and dtype != torch.float32 else None)

    def forward(self, batch: MicroBatch, *, with_entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logprobs [M] in nats, and entropies [M], of the trained tokens of `batch`, wherever that lies."""
        batch = batch.to(self.device)
        hidden = hidden_states(self.model, batch).index_select(0, batch.sources)  # [M, H]
        head = Head.of(self.model)
        return token_logprobs(hidden, batch.targets, head, chunk=self._chunk, with_entropy=with_entropy)

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> Tensor:
        """Logprobs [M], without a graph."""
        logprobs, _ = self(batch)
        if isinstance(self, FSDPModule):
            self.reshard()  # or what was gathered would outlive the next update
        return logprobs

    @contextmanager
    def without_adapters(self) -> Iterator[Policy]:
        """Inside, it is the model that the adapters are on."""
        assert self.adapters is not None
        with self.adapters.disable_adapter():
            yield self

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by its name in the model."""
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def merged(self, masters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's weights by name, whole, on the CPU, adapters added in, from the `masters` that train.

        Tied weights are one tensor under two names. Where weights are sharded, every rank has to ask.
        """
        known: dict[int, Tensor] = {}
        for name, each in self.model.named_parameters():
            known[id(each)] = whole(masters.get(name, each).detach()).cpu()
        kept = self.model.state_dict().keys()
        weights = {
            name: known[id(each)] for name, each in self.model.named_parameters(remove_duplicate=False)
        }
        weights |= {name: each.cpu() for name, each in self.model.named_buffers() if name in kept}
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLinear):
                down = weights.pop(f"{name}.lora_A.{_ADAPTER}.weight")
                up = weights.pop(f"{name}.lora_B.{_ADAPTER}.weight")
                delta = up @ down * module.scaling[_ADAPTER]
                base = weights[f"{name}.base_layer.weight"]
                weights[f"{name}.base_layer.weight"] = base + (delta.T if module.fan_in_fan_out else delta)
        return {name.replace(".base_layer.", "."): each for name, each in weights.items()}


def refuse_adapter(model: str) -> None:
    """Raises PolicyError where a folder holds an adapter and no model."""
    folder = Path(model)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise PolicyError(f"{model} is an adapter: train on from its merged export, or resume it")


def _load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    refuse_adapter(name)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        where = "" if Path(name).is_dir() else "no such folder, and no model of that name can be had: "
        raise PolicyError(f"{name} cannot be loaded: {where}{str(error).splitlines()[0]}") from error
    for weight, each in model.named_parameters():
        if not each.isfinite().all():
            raise PolicyError(f"{name} cannot be trained: {weight} holds NaN or infinity")
    return model


def _device(config: PolicyConfig) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(config.device if config.device != "auto" else "cuda" if count else "cpu")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise PolicyError(f"policy.device: no {device}, for this machine has {count} GPUs that torch can use")
    if device.type == "cpu" and config.attention == "flex":
        raise PolicyError('policy.attention: "flex" needs a GPU; "blocks" computes the same here')
    return device


def _with_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    targets = config.target_modules
    peft = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, peft)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLinear):
            raise ValueError(f"lora: {name} is a {type(module).__name__}; adapters go on linear layers alone")
    adapted.eval()
    return adapted
