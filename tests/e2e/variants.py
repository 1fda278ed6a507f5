"""Other weights of a model's shape, and what they make of some ids; run by the engine's own Python.

    python variants.py MODEL FOLDER ID...     prints {name: logprobs of the ids, the first 0}

FOLDER gets `full-1` and `full-2`, checkpoints; `lora-1` and `lora-2`, adapters of `MODEL`; `wide`, a
checkpoint with a larger matrix. An adapter's logprobs are those of the weights with it merged in.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

RANK, ALPHA = 8, 16


def main(model: Path, folder: Path, ids: list[int]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    weights = load_file(model / "model.safetensors")
    found = {"start": scores(model, weights, ids)}
    for name, scale in (("full-1", 0.02), ("full-2", 0.05)):
        noisy = {k: v + scale * v.std() * torch.randn_like(v) for k, v in weights.items()}
        save(model, folder / name, noisy)
        found[name] = scores(model, noisy, ids)
    grown = "model.layers.3.mlp.gate_proj.weight"
    save(model, folder / "wide", weights | {grown: torch.cat([weights[grown]] * 2)})
    for name, scale in (("lora-1", 0.02), ("lora-2", 0.05)):
        merged, adapter = dict(weights), {}
        for key in [k for k in weights if k.endswith(("q_proj.weight", "v_proj.weight"))]:
            rows, columns = weights[key].shape
            a, b = scale * torch.randn(RANK, columns), scale * torch.randn(rows, RANK)
            stem = "base_model.model." + key.removesuffix(".weight")
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            merged[key] = weights[key] + ALPHA / RANK * b @ a
        (folder / name).mkdir()
        save_file(adapter, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        found[name] = scores(model, merged, ids)
    print(json.dumps(found))


def save(model: Path, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def scores(model: Path, weights: dict[str, torch.Tensor], ids: list[int]) -> list[float]:
    """[T]"""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy.load_state_dict(weights)
    with torch.no_grad():
        logprobs = policy(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return [0.0, *logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(i) for i in sys.argv[3:]])
