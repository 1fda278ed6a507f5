"""The fingerprint of a folder's tokenizer is the one that a capture records of an engine serving it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config

from polar_mitm.errors import SetupError
from polar_mitm.upstream.probe import TOKENIZER_TEXT, fingerprint_of
from polar_mitm_trainer.identity import policy_of


def folder(path: Path, *, begins: bool = False) -> Tokenizer:
    """A model's folder: a byte-level tokenizer, maybe one that begins a text with a special id."""
    vocab = {"<s>": 0} | {
        letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)
    }
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    Qwen3Config(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        path
    )
    return tokenizer


@pytest.mark.parametrize("begins", [False, True])
def test_of_a_folder(tmp_path: Path, begins: bool) -> None:
    tokenizer = folder(tmp_path, begins=begins)
    ids = tokenizer.encode(TOKENIZER_TEXT).ids
    assert (ids[0] == 0) is begins and len(ids) == len(TOKENIZER_TEXT.encode()) + begins
    found = policy_of(str(tmp_path), served_as="mine")
    assert (found.tokenizer, found.model, found.vocab_size) == (fingerprint_of(ids), "mine", 300)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is no model that transformers can read"):
        policy_of(str(tmp_path))
