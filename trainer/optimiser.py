"""AdamW on float32 weights, whatever the policy computes in; its state can be told and taken back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polar_mitm_trainer.config import OptimiserConfig
from polar_mitm_trainer.distributed import like, local, whole

_MOMENTS = ("exp_avg", "exp_avg_sq")
Snapshot = dict[str, dict[str, Tensor]]


class Optimiser:
    """AdamW with a linear warm-up to a constant rate; weights of one dimension (norms, biases) do not decay.

    What is stored in less than float32 is updated in a float32 copy, its master, and rounded from there: an
    update of 1e-6 is nothing to a bfloat16 weight. Gradients of micro-batches add up in float32 as well.
    A sharded parameter (FSDP2) is float32 and its own master.

    Args:
        parameters: what trains, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimiserConfig) -> None:
        self._config = config
        self._parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            self.masters[name] = parameter
            if parameter.dtype.itemsize < 4:
                self.masters[name] = parameter.detach().float()
                parameter.register_post_accumulate_grad_hook(_add_to(self.masters[name]))
        masters = self.masters.values()
        groups: list[dict[str, Any]] = [
            {"params": [each for each in masters if each.ndim >= 2]},
            {"params": [each for each in masters if each.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            groups,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`, from 1."""
        return self._config.lr * min(1.0, step / max(self._config.warmup_steps, 1))

    def grad_norm(self) -> float:
        """Over all gradients; of all ranks, where they are sharded."""
        return float(whole(torch.nn.utils.get_total_norm(self._gradients())))

    def update(self, rate: float, grad_norm: float) -> None:
        """One update from the gradients, whose norm is `grad_norm`, clipped to the configured norm."""
        factor = self._config.max_grad_norm / (grad_norm + 1e-6)
        if factor < 1.0:
            torch._foreach_mul_(self._gradients(), factor)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._round()
        self.forget()

    def finite(self) -> bool:
        """Are all weights numbers? On several ranks, all have to ask."""
        masters = [each.detach() for each in self.masters.values()]
        return math.isfinite(whole(torch.nn.utils.get_total_norm(masters, math.inf)))

    def forget(self) -> None:
        """Drop the gradients."""
        self._adamw.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """AdamW's own, whole and on the CPU, as `KIND.NAME`. Where it is sharded, every rank has to ask."""
        return {
            f"{kind}.{name}": whole(value).cpu()
            for name, master in self.masters.items()
            for kind, value in self._adamw.state.get(master, {}).items()
        }

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take back whole float32 `weights` by name, and what `state` told.

        Raises:
            ValueError: they are of other parameters.
        """
        for name, master in self.masters.items():
            if name not in weights or weights[name].shape != master.shape:
                raise ValueError(f"no weights for {name} in shape {list(master.shape)}")
        self.forget()
        for name, master in self.masters.items():
            master.detach().copy_(like(weights[name], master))
            self._adamw.state.pop(master, None)
            if f"step.{name}" in state:
                moments = {kind: like(state[f"{kind}.{name}"], master) for kind in _MOMENTS}
                self._adamw.state[master] = {"step": state[f"step.{name}"].to(master.device), **moments}
        self._round()

    def snapshot(self) -> Snapshot:
        """Copies, on the CPU, of all that `update` changes (of this rank's shards)."""
        return {
            name: {kind: local(value).to("cpu", copy=True) for kind, value in self._all(master).items()}
            for name, master in self.masters.items()
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Back to how it was, without gradients."""
        self.forget()
        for name, master in self.masters.items():
            for kind, value in self._all(master).items():
                if kind in snapshot[name]:
                    local(value).copy_(snapshot[name][kind])
                else:
                    self._adamw.state.pop(master, None)
        self._round()

    def _all(self, master: Tensor) -> dict[str, Tensor]:
        return {"weight": master.detach(), **self._adamw.state.get(master, {})}

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def _round(self) -> None:
        """From the masters to what computes."""
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter:
                parameter.detach().copy_(self.masters[name])


def _add_to(master: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return add
