"""Weights in GPU memory, as vLLM's workers on the same GPUs can open them (CUDA IPC).

Source: vLLM 0.32, `distributed/weight_transfer/ipc_engine.py`: an update names each tensor, its dtype and
shape, and carries what `torch.multiprocessing.reductions.reduce_tensor` made of it, by the GPU's UUID, as a
base64 pickle. `polar_mitm.upstream.weights.EngineWeights.transfer` sends it to an engine that was started
with `polar-mitm engine up --transfer`.

Not yet run on a GPU: `tests/gpu/test_transfer.py` does, where there is one. On a CPU, weights go by a folder.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor


def shared(
    weights: Iterable[tuple[str, torch.Tensor]], *, chunk_bytes: int = 1 << 30
) -> Iterator[tuple[dict[str, Any], list[torch.Tensor]]]:
    """vLLM's `update_info` for at most so many bytes of tensors each, and the tensors that it points to.

    Args:
        weights: names as in a Hugging Face checkpoint, and tensors on one CUDA device, the whole of each (of
            an FSDP parameter: `full_tensor()`), the output layer among them.

    The tensors of a chunk must live until the engine has confirmed the whole update.

    Raises:
        ValueError: a tensor is not in GPU memory.
    """
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    size = 0
    for name, weight in weights:
        if not weight.is_cuda:
            raise ValueError(f"{name} is on {weight.device}: only GPU memory can be shared with an engine")
        tensor = weight.detach().contiguous()
        if tensors and size + tensor.nbytes > chunk_bytes:
            yield _update_info(names, tensors), tensors
            names, tensors, size = [], [], 0
        names.append(name)
        tensors.append(tensor)
        size += tensor.nbytes
    if tensors:
        yield _update_info(names, tensors), tensors


def _update_info(names: list[str], tensors: list[torch.Tensor]) -> dict[str, Any]:
    handles = []
    for tensor in tensors:
        uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
        handles.append({uuid: reduce_tensor(tensor)[1]})
    return {
        "names": names,
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        "shapes": [list(tensor.shape) for tensor in tensors],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }
