"""A Hugging Face causal LM over a forest of tokens (`MicroBatch`), exactly, and without a mask [N, N].

The model calls us as its attention function (transformers' AttentionInterface), with the forest as a keyword
that its layers hand through. Where tokens meet in another way as well (convolutions, linear attention, sinks,
capped scores, a sliding window shorter than the deepest token) branches would see each other, or a token less
than its path: such a model is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from polar_mitm_trainer.attention_blocks import block_attention
from polar_mitm_trainer.attention_flex import flex_attention_over
from polar_mitm_trainer.microbatch import MicroBatch

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
_KINDS: dict[str, Callable[[MicroBatch], Attend]] = {
    "polar_forest_blocks": lambda batch: block_attention(batch.nodes),
    "polar_forest_flex": lambda batch: flex_attention_over(batch.nodes, batch.token_ids.device),
}
_LAYERS = {"full_attention", "sliding_attention"}
_REFUSED = ("softcap", "s_aux", "sinks", "position_bias")  # what some models hand their attention function


class Forest:
    """One forward pass: how its tokens attend, how deep they go, and how many layers did so far."""

    def __init__(self, attend: Attend, depth: int) -> None:
        self.attend = attend
        self.depth = depth
        self.layers = 0


def use_forest_attention(model: nn.Module, kind: Literal["auto", "blocks", "flex"] = "auto") -> None:
    """Make `model`, bare or with adapters, attend by forests and by nothing else. "auto" is "blocks".

    Raises:
        ValueError: a model that cannot.
    """
    inner = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} is no Hugging Face model")
    config = inner.config.get_text_config()
    odd = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if getattr(config, "attention_chunk_size", None):
        odd.add("chunked_attention")
    if odd:
        told = ", ".join(sorted(odd))
        raise ValueError(f"{config.model_type}: packed sequences cannot be trained through {told}")
    name = "polar_forest_flex" if kind == "flex" else "polar_forest_blocks"
    inner.set_attn_implementation(name)
    if config._attn_implementation != name:
        raise ValueError(f"{config.model_type}: an attention of its own, which cannot be replaced")


def hidden_states(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The last hidden state [N, H] of each token of `batch`, as its sequence alone would give it.

    `model` is a causal LM, bare or with adapters, after `use_forest_attention`.

    Raises:
        ValueError: a model that does more between tokens than this attention (see above).
    """
    base: Any = model.get_decoder()  # type: ignore[operator]
    config: PreTrainedConfig = base.config
    make = _KINDS.get(config._attn_implementation or "")
    if make is None:
        raise ValueError(f"{type(model).__name__}: call use_forest_attention first")
    forest = Forest(make(batch), int(batch.position_ids.max()) + 1)
    if forest.depth > (most := _unstretched(config)):
        raise ValueError(
            f"{config.model_type}: a sequence of {forest.depth} tokens, but beyond {most} positions are "
            "encoded by the length of the whole sequence, which packed ones do not share"
        )
    out = base(
        input_ids=batch.token_ids[None], position_ids=batch.position_ids[None], use_cache=False, forest=forest
    )
    if forest.layers != config.num_hidden_layers:
        raise ValueError(
            f"{config.model_type}: {forest.layers} of {config.num_hidden_layers} layers attend as they are "
            "told; packed sequences cannot be trained through such a model"
        )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def _unstretched(config: PreTrainedConfig) -> float:
    """Up to how many tokens a position's rotary embedding is the same in every sequence."""
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [
        each.get("original_max_position_embeddings") or config.max_position_embeddings
        for each in (rope, *rope.values())
        if isinstance(each, dict) and each.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=float("inf"))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    forest: Forest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, H, N, D], key and value [1, fewer, N, D], to [1, N, H, D]."""
    name = type(module).__name__
    if forest is None or attention_mask is not None:
        raise ValueError(f"{name} attends by forests alone: call the model through hidden_states()")
    odd = [each for each in _REFUSED if kwargs.get(each) is not None]
    if dropout:
        odd.append("dropout")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        odd.append("a view of later tokens")
    if sliding_window and forest.depth > sliding_window:
        odd.append(f"a window of {sliding_window} tokens (a sequence has {forest.depth})")
    if odd:
        raise ValueError(f"{name}: attention with {', '.join(odd)} is not supported")
    forest.layers += 1
    size, narrower = value.shape[-1], query.shape[-1] - value.shape[-1]
    out = forest.attend(
        query,
        key,
        F.pad(value, (0, narrower)) if narrower else value,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return out[..., :size].transpose(1, 2), None


for _name in _KINDS:
    AttentionInterface.register(_name, _attention)
