"""Samples that begin alike, models small enough for float64, and what those say of a sample alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from polar_mitm_trainer.attention import hidden_states
from polar_mitm_trainer.microbatch import MicroBatch
from polar_mitm_trainer.samples import Sample

VOCABULARY = 61
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
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
}


def sample(number: int, ids: Sequence[int], trained: Iterable[int]) -> Sample:
    """One whose tokens at `trained` train, with advantages and logprobs of its own."""
    rng = np.random.default_rng(number)
    mask = np.zeros(len(ids), np.uint8)
    mask[list(trained)] = 1
    noise = rng.normal(size=(3, len(ids))).astype(np.float32) * mask
    return Sample(
        trajectory_id=f"trajectory-{number}",
        rollout_id=f"rollout-{number // 2}",
        group_id="group",
        token_ids=np.array(ids, np.int32),
        loss_mask=mask,
        behaviour_logprobs=-abs(noise[0]),
        advantages=noise[1],
        weights=abs(noise[2]),
    )


@st.composite
def groups(draw: st.DrawFn, longest: int = 12) -> list[Sample]:
    """Sequences that continue, repeat or leave earlier ones, or have nothing to do with them."""
    token = st.integers(0, 3)
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(1, 7))):
        known = draw(st.sampled_from([[], *sequences]))
        kept = known[: draw(st.integers(0, len(known)))]
        sequences.append(kept + draw(st.lists(token, min_size=0 if kept else 1, max_size=longest)))
    trained = st.sets(st.integers(1, 3 * longest))
    return [
        sample(number, ids, sorted(draw(trained) & set(range(1, len(ids)))))
        for number, ids in enumerate(sequences)
    ]


def model(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random weights, large enough that tokens differ; in float64 the norms are too, not just float32."""
    torch.manual_seed(7)
    made = AutoModelForCausalLM.from_config(deepcopy(config))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    if dtype == torch.float64:
        _exact_norms(made)
    return made.to(dtype)


def _exact_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child).__name__.endswith("RMSNorm"):
            exact = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
            exact.weight = child.weight
            setattr(module, name, exact)
        else:
            _exact_norms(child)


def score(net: nn.Module, batch: MicroBatch) -> Tensor:
    """Logprobs [M] of a micro-batch's trained tokens."""
    logits = net.get_output_embeddings()(hidden_states(net, batch)[batch.sources])
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def alone(net: nn.Module, each: Sample) -> Tensor:
    """Logprobs [m] of a sample's trained tokens, from a forward pass of Hugging Face's over it alone."""
    ids = torch.from_numpy(each.token_ids).long()
    logprobs = net(input_ids=ids[None]).logits[0].log_softmax(-1)
    at = torch.from_numpy(np.flatnonzero(each.loss_mask))
    return logprobs[at - 1, ids[at]]


def backward(net: nn.Module, losses: Callable[[], Iterable[Tensor]]) -> tuple[float, Tensor]:
    """The sum of `losses`, each followed by its backward pass, and all gradients in one vector."""
    net.zero_grad()
    total = 0.0
    for loss in losses():
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
