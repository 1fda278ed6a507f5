"""Tiny policies that have something to say, samples for them, and what plain transformers makes of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.learner import Learner
from polar_mitm_trainer.samples import Sample, weigh

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TIED = Qwen3Config(**SHAPE, tie_word_embeddings=True)
UNTIED = LlamaConfig(**SHAPE, tie_word_embeddings=False)


def policy_folder(folder: Path, config: PretrainedConfig = TIED, *, seed: int = 5) -> Path:
    """A Hugging Face folder of a model with random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # or all tokens would be alike
        nn.init.normal_(parameter, std=0.25)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def samples_for(model: Path, *, seed: int = 0, num: int = 8) -> list[Sample]:
    """Two groups, each behind a prompt of its own, two trajectories per rollout, of different lengths.

    The behaviour logprobs are the model's own, a little off.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCABULARY, 40) for _ in range(2)]
    made = []
    for n in range(num):
        group = n * 2 // num
        own = rng.integers(0, VOCABULARY, rng.integers(20, 60))
        ids = np.concatenate([prompts[group], own]).astype(np.int32)
        mask = np.concatenate([np.zeros(40), rng.integers(0, 2, own.size)]).astype(np.uint8)
        off = rng.normal(0, 0.1, ids.size)
        made.append(
            (f"t{n}", f"r{n // 2}", f"g{group}", ids, mask, off, (mask * rng.normal()).astype(np.float32))
        )
    with torch.no_grad():
        engine = plain(model)
        scores = [plain_logprobs(engine, ids).numpy() for _, _, _, ids, *_ in made]
    return weigh(
        [
            Sample(t, r, g, ids, mask, (mask * (score + off)).astype(np.float32), advantages, advantages)
            for (t, r, g, ids, mask, off, advantages), score in zip(made, scores, strict=True)
        ],
        "token",
    )


def plain(model: Path, **options: Any) -> Any:
    """As transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options).eval()


def plain_logprobs(model: Any, ids: np.ndarray) -> Tensor:
    """Logprobs [T] of ids [T] by a forward pass over them alone, with gradient; the first one's is 0."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    logits = model(tokens[None], use_cache=False).logits[0]
    picked = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    return torch.cat([picked.new_zeros(1), picked])


def config_for(model: Path, **tables: Any) -> TrainConfig:
    """Tables as in TOML; `policy` may leave out the model."""
    policy = {"model": str(model), **tables.pop("policy", {})}
    optimiser = {"lr": 0.01, **tables.pop("optimiser", {})}
    return TrainConfig.model_validate({"policy": policy, "optimiser": optimiser, **tables})


def weights(learner: Learner) -> dict[str, Tensor]:
    """Copies of all that the policy computes with."""
    return {name: each.detach().clone() for name, each in learner.policy.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
