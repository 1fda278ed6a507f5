"""Folders of a learner: Hugging Face ones, and in those that go on, what else a learner is made of.

    checkpoints/step-12/    config.json model.safetensors tokenizer...   as transformers (or peft) loads it
        trainer/            optimiser.safetensors state.json

A folder is written beside its place, flushed to the disk and renamed, so that it is there whole or not at
all. `state.json` holds the sizes of all files: what was cut short in another way is told, and passed over.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

STATE = Path("trainer/state.json")
OPTIMISER = Path("trainer/optimiser.safetensors")
_ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of peft's names
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A folder is no checkpoint, or of another learner; the message says why."""


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of `folder` if all goes well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (folder.with_name(f".{folder.name}.{what}-{os.getpid()}") for what in ("new", "old"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for each in [*beside.rglob("*"), beside]:
            _flush(each)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def latest(checkpoints: Path) -> Path | None:
    """The last `step-N` that is whole; of those that are not it is told in the log."""
    for folder in _steps(checkpoints)[::-1]:
        try:
            read_state(folder)
        except CheckpointError as error:
            _log.warning("passed over: %s", error)
        else:
            return folder
    return None


def prune(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the last `keep_last` (at least one) of `step-N`."""
    for folder in _steps(checkpoints)[: -max(keep_last, 1)]:
        shutil.rmtree(folder)


def _steps(checkpoints: Path) -> list[Path]:
    found = [each for each in checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", each.name)]
    return sorted(found, key=lambda each: int(each.name.removeprefix("step-")))


def write_model(
    folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor], dtype: torch.dtype, *, untied: bool
) -> None:
    """A Hugging Face folder of `weights`, all that `model` has, by its names, in `dtype`.

    Tied embeddings are one tensor under two names, and stay so unless they are to be `untied`.
    """
    config = copy.deepcopy(model.config)
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):  # `model` itself may be sharded, adapted, in another precision
        shape = AutoModelForCausalLM.from_config(config, dtype=dtype)
    cast: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, each in weights.items():
        if id(each) not in cast:
            state[name] = cast[id(each)] = each.to(dtype) if each.is_floating_point() else each
        else:
            state[name] = cast[id(each)].clone() if untied else cast[id(each)]
    shape.save_pretrained(folder, state_dict=state)
    copy_tokenizer(folder, model)


def copy_tokenizer(folder: Path, model: PreTrainedModel) -> None:
    """What an engine needs beside the weights, as it was where `model` came from."""
    for name in _COPIED:
        found = cached_file(
            str(model.name_or_path),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if found is not None:
            shutil.copyfile(found, folder / name)


def write_adapter(folder: Path, adapters: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """A peft folder of the adapters' `weights`, by their names in the model; vLLM loads it too."""
    config = copy.deepcopy(adapters.active_peft_config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    named = {
        f"{_PREFIX}{name.replace('.default.', '.')}": each.contiguous() for name, each in weights.items()
    }
    save_file(named, folder / _ADAPTER, metadata={"format": "pt"})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Weights by their names in the model: all in float32, or the adapters', whichever the folder holds."""
    if (folder / _ADAPTER).exists():
        return {
            re.sub(r"\.weight$", ".default.weight", name.removeprefix(_PREFIX)): each
            for name, each in load_file(folder / _ADAPTER).items()
        }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: each.detach() for name, each in model.named_parameters()}


def write_state(folder: Path, optimiser: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """What a learner is beside its weights; the last thing that is written."""
    (folder / STATE).parent.mkdir()
    save_file({name: each.contiguous() for name, each in optimiser.items()}, folder / OPTIMISER)
    sizes = {
        str(each.relative_to(folder)): each.stat().st_size for each in folder.rglob("*") if each.is_file()
    }
    (folder / STATE).write_text(json.dumps({**state, "files": sizes}))


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` was given as `state`.

    Raises:
        CheckpointError: the folder is no checkpoint, or not a whole one.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        sizes = state.pop("files")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {STATE}") from None
    except (ValueError, KeyError):
        raise CheckpointError(f"{folder} is no whole checkpoint: {STATE} cannot be read") from None
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != size:
            lacks = "is missing" if found is None else f"has {found:,} bytes of {size:,}"
            raise CheckpointError(f"{folder} is no whole checkpoint: {name} {lacks}")
    return state


def read_optimiser(folder: Path) -> dict[str, Tensor]:
    """What `write_state` was given as `optimiser`."""
    return load_file(folder / OPTIMISER)


def random_states() -> dict[str, Any]:
    """Of this process's generators, as JSON takes it."""
    kind, key, *rest = np.random.get_state()
    assert isinstance(key, np.ndarray)
    gpu = [each.tolist() for each in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, key.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": gpu,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Back to what `random_states` told."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.tensor(each, dtype=torch.uint8) for each in states["cuda"]])


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
