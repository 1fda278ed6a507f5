"""One learner on several processes: they share its weights (FSDP2) and its micro-batches.

    torchrun --nproc-per-node 8 ...

starts them; each makes `Distributed.from_environment()`, hands it to its `Learner`, and all call that alike,
with the same samples. Losses and gradients of ranks add up: samples' weights are those of the whole step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Distributed:
    """Which of how many processes this is; by default the only one."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    mesh: DeviceMesh | None = None

    @classmethod
    def from_environment(cls, device: str = "auto") -> Distributed:
        """What `torchrun` says in the environment; the only process where it says nothing.

        Raises:
            RuntimeError: the others cannot be reached.
        """
        if "RANK" not in os.environ:
            return cls()
        kind = (
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.partition(":")[0]
        )
        own = torch.device(kind)
        if kind == "cuda":
            own = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(own)
        mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
        return cls(dist.get_rank(), dist.get_world_size(), own, mesh)

    def close(self) -> None:
        """Take leave of the others."""
        if self.mesh is not None:
            dist.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Each rank's `value`, in their order."""
        if self.mesh is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def spread(self, work: Sequence[T]) -> list[T | None]:
        """This rank's part of `work`: as many as every other rank gets, so some may be None."""
        padded = [*work, *[None] * (-len(work) % self.size)]
        return padded[self.rank :: self.size]

    def shard(self, root: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
        """Shard the parameters of `root`; as it computes, they are gathered by layer, in `dtype` if given.

        Their gradients add up over ranks, in float32 where `dtype` is less.
        """
        if self.mesh is None:
            return
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
        )
        for each in (*layers, root):
            fully_shard(each, mesh=self.mesh, mp_policy=policy)
        for each in root.modules():
            if isinstance(each, FSDPModule):
                each.set_gradient_divide_factor(1.0)
                each.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which a shard is here; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, shape: Tensor) -> Tensor:
    """A whole `tensor`, as `shape` lies: on its device, and of it what this rank has."""
    tensor = tensor.to(shape.device)
    if not isinstance(shape, DTensor):
        return tensor
    return distribute_tensor(tensor, shape.device_mesh, shape.placements, src_data_rank=None)
