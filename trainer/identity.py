"""What a Hugging Face model was made with, to compare with what calls were sampled with. No torch here."""

from __future__ import annotations

from polar_mitm.errors import SetupError
from polar_mitm.upstream.probe import TOKENIZER_TEXT, fingerprint_of
from polar_mitm_trainer.selection import Policy


def policy_of(model: str, *, served_as: str | None = None) -> Policy:
    """The tokenizer's fingerprint and the vocabulary of a folder (or a name that transformers knows).

    The fingerprint is what a capture records of an engine that serves this folder. `served_as` is the model's
    name there, where trajectories of another one are to be refused.

    Raises:
        SetupError: no transformers here, or no such model.
    """
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise SetupError("training needs transformers: pip install 'polar-mitm[train]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        vocab_size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"{model} is no model that transformers can read: {error}") from error
    return Policy(fingerprint_of(tokenizer(TOKENIZER_TEXT)["input_ids"]), served_as, vocab_size)
