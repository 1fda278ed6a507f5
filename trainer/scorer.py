"""Teacher forcing in torch: what logprob has each id of a sequence, given the ids before it?

    python scorer.py MODEL DTYPE

serves that over stdin and stdout, for a program that has no torch of its own (`polar_mitm.verify.process`
says how they talk). So nothing of this project is imported here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar

_CHUNK = 1024
_CHUNK_LOGITS = 1 << 26  # [chunk, vocabulary] stays below 256 MB of float32


class TorchScorer:
    """Scores sequences with a Hugging Face causal language model, one sequence at a time.

    A sequence goes through the model in chunks over a KV cache, so that memory is bounded by one sequence's
    cache and one chunk's logits. A prefix that it shares with the sequence before it (a rollout's branches,
    a group's prompt) is not computed again.

    Args:
        model: a folder as `save_pretrained` writes it, or a name that is cached or can be downloaded.
        dtype: of the weights and of all but the softmax, which is float32. "float32" agrees with a float32
            engine to rounding.
        device: as torch names it.

    Raises:
        OSError, ValueError: `model` is no such model.
    """

    def __init__(self, model: Path | str, dtype: str = "float32", device: str = "cpu") -> None:
        self._model = AutoModelForCausalLM.from_pretrained(str(model), dtype=getattr(torch, dtype))
        self._model.to(device).eval()
        self._device = device
        self.vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        self._chunk = max(16, min(_CHUNK, _CHUNK_LOGITS // self.vocabulary))
        self._cache = DynamicCache(config=self._model.config)
        self._ids = np.zeros(0, dtype=np.int64)  # [S] what the cache holds
        self._scores = np.zeros(0)  # [S] of them

    @torch.inference_mode()
    def score(self, ids: NDArray[np.integer]) -> NDArray[np.float64]:
        """Logprobs [T] of ids [T] in nats under the model's own softmax; NaN at the first.

        Raises:
            ValueError: an id that the model does not have.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            at = int(np.argmax((ids < 0) | (ids >= self.vocabulary)))
            raise ValueError(f"id {ids[at]} at position {at} is not among the model's {self.vocabulary}")
        scores = np.full(ids.size, np.nan)
        known = self._keep(ids)
        scores[1 : known + 1] = self._scores[1 : known + 1]
        self._ids = ids[:0]  # should this end half-way
        for start in range(known, ids.size, self._chunk):
            end = min(start + self._chunk, ids.size)
            chunk = torch.from_numpy(ids[None, start:end]).to(self._device)
            logits = self._model(input_ids=chunk, past_key_values=self._cache, use_cache=True).logits[0]
            targets = torch.from_numpy(ids[start + 1 : end + 1]).to(self._device)
            logprobs = torch.log_softmax(logits[: targets.numel()].float(), dim=-1)
            scores[start + 1 : start + 1 + targets.numel()] = (
                logprobs.gather(1, targets[:, None])[:, 0].double().cpu().numpy()
            )
        self._ids, self._scores = ids.copy(), scores
        return scores.copy()

    def _keep(self, ids: NDArray[np.int64]) -> int:
        """Cut the cache down to what `ids` begin with; returns how many of them it holds.

        The last shared id is fed again, since only its logits say what the next one scores.
        """
        most = min(ids.size, self._ids.size)
        differs = ids[:most] != self._ids[:most]
        shared = max(0, (int(np.argmax(differs)) if differs.any() else most) - 1)
        if shared and all(type(layer) is DynamicLayer for layer in self._cache.layers):  # others lose ids
            self._cache.crop(shared - self._ids.size)  # below zero: how many to remove
            return shared
        self._cache = DynamicCache(config=self._model.config)
        return 0


def main(model: str, dtype: str) -> None:
    """Score what comes on stdin until it ends."""
    disable_progress_bar()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    scorer = TorchScorer(model, dtype)
    out.write(np.int64(scorer.vocabulary).tobytes())
    out.flush()
    while head := sys.stdin.buffer.read(8):
        ids = np.frombuffer(sys.stdin.buffer.read(8 * int.from_bytes(head, sys.byteorder)), dtype=np.int64)
        try:
            answer = scorer.score(ids).tobytes()
            size = ids.size
        except ValueError as error:
            answer = str(error).encode()
            size = -len(answer)
        out.write(np.int64(size).tobytes() + answer)
        out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
