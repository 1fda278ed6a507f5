"""What benchmarks of a training step share: trajectories, a model, a process per side, a comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from polar_mitm_trainer.samples import Sample

ROOT = Path(__file__).parents[2]
VOCABULARY = 2048
_ARRAYS = ("token_ids", "loss_mask", "behaviour_logprobs", "advantages", "weights")
Result = Mapping[str, float]


@dataclass(frozen=True)
class Spec:
    """What one process does. `samples` is what `save` wrote, their first `prompt` tokens what TRL calls so.

    `max_tokens` and `tree` are this trainer's packing, `batch` TRL's sequences per device and forward pass.
    """

    side: str
    model: str
    samples: str
    prompt: int
    loss: str = "dapo"
    steps: int = 2
    threads: int = 2
    checkpointing: bool = False
    max_tokens: int = 16_384
    tree: bool = True
    batch: int = 1


def trajectory(
    rng: np.random.Generator, number: int, prompt: np.ndarray, turns: list[tuple[int, int]]
) -> Sample:
    """Behind a prompt, turns of an answer, which trains, and of a tool's output; a rollout of its own."""
    mask = np.concatenate([np.zeros(prompt.size), *(np.repeat([1, 0], turn) for turn in turns)]).astype(
        np.uint8
    )
    return Sample(
        trajectory_id=f"trajectory-{number}",
        rollout_id=f"rollout-{number}",
        group_id="group",
        token_ids=np.r_[prompt, rng.integers(0, VOCABULARY, mask.size - prompt.size)].astype(np.int32),
        loss_mask=mask,
        behaviour_logprobs=(rng.normal(-np.log(VOCABULARY), 0.05, mask.size) * mask).astype(np.float32),
        advantages=(mask * rng.normal()).astype(np.float32),
        weights=np.zeros(mask.size, np.float32),
    )


def save(path: Path, samples: list[Sample]) -> None:
    """For `load`."""
    np.savez(
        path, **{f"{n}_{name}": getattr(each, name) for n, each in enumerate(samples) for name in _ARRAYS}
    )


def load(path: str) -> list[Sample]:
    """What was saved."""
    with np.load(path) as arrays:
        return [
            Sample(
                trajectory_id=f"trajectory-{n}",
                rollout_id=f"rollout-{n}",
                group_id="group",
                **{name: arrays[f"{n}_{name}"] for name in _ARRAYS},
            )
            for n in range(len(arrays.files) // len(_ARRAYS))
        ]


def write_model(folder: Path) -> None:
    """Random weights in the shape of the tiny policy, and a tokenizer, which TRL asks for and nobody uses."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokens = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="w1", pad_token="w0").save_pretrained(folder)


def run(spec: Spec, **changes: object) -> Result:
    """What a process of its own measured (`tests.bench.update_sides`)."""
    spec = replace(spec, **changes)  # type: ignore[arg-type]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asdict(spec), file)
        file.flush()
        command = [sys.executable, "-m", "tests.bench.update_sides", file.name]
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def check_same(results: Mapping[str, Result]) -> None:
    """All sides found the same loss and gradient norm, to what they print of them."""
    first = next(iter(results.values()))
    for name, each in results.items():
        for what in ("loss", "grad_norm"):
            if abs(each[what] - first[what]) > 1e-4 + 2e-3 * abs(first[what]):
                sys.exit(f"{name}: {what} is {each[what]}, not {first[what]}")


def report(
    results: Mapping[str, Result], lengths: list[int], pairs: list[tuple[str, str]], as_json: bool
) -> None:
    """Print each side, in tokens of the trajectories (not padding), and how much better `pairs` are.

    A pair is a side and the beginning of others' names, the best of which it is compared with in each figure.
    `cpu` is processor time, which other programs on the machine change less.
    """
    told: dict[str, dict[str, float]] = {
        "trajectories": {"num": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
    }
    for name, each in results.items():
        told[name] = {
            "tokens_per_s": round(sum(lengths) / each["seconds"]),
            "cpu_tokens_per_s": round(sum(lengths) / each["cpu_seconds"]),
            "peak_mb": round(each["peak_bytes"] / 1e6),
        }
    for name, other in pairs:
        others = [each for key, each in results.items() if key.startswith(other)]
        told[f"{name} / {other}"] = {
            "tokens_per_s": round(min(each["seconds"] for each in others) / results[name]["seconds"], 2),
            "cpu_tokens_per_s": round(
                min(each["cpu_seconds"] for each in others) / results[name]["cpu_seconds"], 2
            ),
            "peak_mb": round(results[name]["peak_bytes"] / min(each["peak_bytes"] for each in others), 2),
        }
    if as_json:
        print(json.dumps(told))
        return
    for key, values in told.items():
        print(f"{key:>16}  " + "  ".join(f"{what} {value:>9,}" for what, value in values.items()))
