"""Tiny models with random weights, and what they say of some sequences when asked in the plainest way.

    python reference.py DIRECTORY

runs on a Python with torch, and writes DIRECTORY/NAME/ and DIRECTORY/NAME.npz: sequence `n` as `ids_n`, and
its logprobs as `logprobs_n`, from one forward pass over the whole of it in float64.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
MODELS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    # Attention that forgets, and logits that are squashed.
    "sliding": Gemma2Config(**SHAPE, sliding_window=16, final_logit_softcapping=5.0),
}


def sequences() -> list[np.ndarray]:
    """Longer than one chunk, with long and short common beginnings, one inside another, one alone."""
    rng = np.random.default_rng(3)
    first = rng.integers(0, VOCABULARY, 2500)
    branch = np.concatenate([first[:1800], rng.integers(0, VOCABULARY, 300)])
    return [
        first,
        branch,
        branch[:500],
        branch[:500],
        first[:900],
        rng.integers(0, VOCABULARY, 40),
        first[:1],
    ]


def main(folder: Path) -> None:
    torch.manual_seed(5)
    for name, config in MODELS.items():
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # or all tokens would be alike
            torch.nn.init.normal_(parameter, std=0.4)
        model.tie_weights()
        model.save_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
        arrays = {}
        for number, ids in enumerate(sequences()):
            with torch.inference_mode():
                logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0]
            logprobs = torch.log_softmax(logits.double(), dim=-1)[np.arange(ids.size - 1), ids[1:]]
            arrays |= {f"ids_{number}": ids, f"logprobs_{number}": logprobs.numpy()}
        np.savez(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
