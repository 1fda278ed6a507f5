"""A tiny policy with random weights and a tokenizer of its own, and stores sampled with it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from polar_mitm_trainer.identity import policy_of
from tests.trainer.stores import Recorded, groups, record

VOCABULARY = 512


def tiny_model(folder: Path, *, seed: int = 0, vocabulary: int = VOCABULARY, tied: bool = True) -> Path:
    """A Hugging Face folder."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"w{n}": n for n in range(vocabulary)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="w1", pad_token="w0").save_pretrained(folder)
    return folder


def tiny_store(
    path: Path, model: Path, recorded: list[Recorded] | None = None, *, built: bool = True
) -> Path:
    """Rollouts that were sampled with this model, going by its tokenizer."""
    recorded = groups() if recorded is None else recorded
    fingerprint = policy_of(str(model)).tokenizer or ""
    for one in recorded:
        for call in one.calls:
            call.tokenizer = fingerprint
    return record(path, recorded, built=built)
