"""Whether a folder can be loaded into a running engine, found out before the engine is touched.

vLLM's `reload_weights` checks little: a path that does not exist leaves the model without weights, and its
next token kills the engine; tensors of another shape are loaded in part, with HTTP 200; with tied embeddings
the output layer silently keeps its old weights.

Source: safetensors (huggingface.co/docs/safetensors, "Format"): 8 bytes of length, little-endian, then JSON.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import msgspec

from polar_mitm.errors import WeightsError

_HEAD = "lm_head.weight"
_MAX_HEADER = 100 << 20  # bytes; the format's own limit


def check_model(folder: Path, serving: Path | None) -> Path:
    """The absolute folder; refused if an engine started with the model in `serving` could not take it whole.

    Args:
        serving: None where that is not at hand: then the tensors are not compared.

    Raises:
        WeightsError: the message says why.
    """
    folder = folder.absolute()
    shapes = _tensors(folder)
    if _tied(folder, shapes):
        raise WeightsError(
            f"{folder} has tied embeddings: the engine would keep its old output layer. Save it untied "
            f"(tie_word_embeddings false, {_HEAD} of its own)"
        )
    if serving is None:
        return folder
    served = _tensors(serving)
    if _tied(serving, served):
        raise WeightsError(
            f"the engine was started with tied embeddings ({serving}), and would keep its old output layer: "
            "start it with an untied copy of the model"
        )
    for name in sorted(served.keys() | shapes.keys()):
        if served.get(name) != shapes.get(name):
            here, there = (str(x.get(name) or "nothing") for x in (shapes, served))
            raise WeightsError(f"{folder} is of another shape: {name} is {here}, and {there} in {serving}")
    return folder


def check_adapter(folder: Path) -> Path:
    """The absolute folder; refused if it is no whole LoRA adapter.

    Raises:
        WeightsError: the message says why.
    """
    folder = folder.absolute()
    _json(folder / "adapter_config.json")
    _tensors(folder)
    return folder


def _tied(folder: Path, shapes: dict[str, list[int]]) -> bool:
    config = _json(folder / "config.json")
    inner = config.get("text_config")
    said = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if inner else None)
    # A config leaves out what is its architecture's default.
    return bool(said) if said is not None else _HEAD not in shapes


def _tensors(folder: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a folder's safetensors, whose files are whole."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
    if not files:
        raise WeightsError(f"{folder} holds no weights: there is no .safetensors file")
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            shapes |= _header(file)
        except (OSError, msgspec.MsgspecError, struct.error, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{file} cannot be read: {error or type(error).__name__}") from error
    return shapes


def _header(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER:
            raise ValueError("no safetensors header")
        header = msgspec.json.decode(stream.read(length))
    header.pop("__metadata__", None)
    ends = [tensor["data_offsets"][1] for tensor in header.values()]
    if file.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError("it is cut off")
    return {name: tensor["shape"] for name, tensor in header.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
