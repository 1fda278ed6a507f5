"""A Hugging Face causal language model over a forest of tokens (`MicroBatch`), exactly and without a mask [N, N].

The model calls us as one of its attention functions (transformers' AttentionInterface), with the forest as a
keyword that its layers hand through. A model whose layers mix tokens in another way as well (convolutions, linear
attention, sinks, capped scores, a sliding window shorter than the deepest token) is refused, since branches
would see each other there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from polar_mitm_trainer.attention_blocks import attend_blocks
from polar_mitm_trainer.microbatch import MicroBatch, Node

BLOCKS = "polar_forest_blocks"
_NEVER = ("softcap", "s_aux", "sinks", "position_bias")  # what other models hand their attention function


class Forest:
    """The nodes of one forward pass, how deep they go (tokens), and how many layers attended by them."""

    def __init__(self, nodes: Sequence[Node], depth: int) -> None:
        self.nodes = tuple(nodes)
        self.depth = depth
        self.layers = 0


def use_forest_attention(model: nn.Module, kind: str = "blocks") -> None:
    """Make `model`, or what adapters were put around, attend by forests, and by nothing else.

    Raises:
        ValueError: a model that cannot.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            config = module.config.get_text_config()
            kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
            if kinds or getattr(config, "attention_chunk_size", None):
                raise ValueError(f"{config.model_type}: layers of other kinds than attention over all tokens")
            module.set_attn_implementation(BLOCKS)
            return
    raise ValueError(f"{type(model).__name__} is no Hugging Face model")


def hidden_states(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The last hidden state [N, H] of each token of `batch`, as its own sequence alone would give it.

    `model` is a causal language model, bare or with adapters, after `use_forest_attention`.

    Raises:
        ValueError: a model that does more between tokens than this attention does (see above).
    """
    forest = Forest(batch.nodes, int(batch.position_ids.max()) + 1)
    base: Any = model.get_decoder()  # type: ignore[operator]
    out: Tensor = base(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        forest=forest,
    ).last_hidden_state
    if forest.layers != base.config.num_hidden_layers:
        raise ValueError(
            f"{base.config.model_type}: {forest.layers} of {base.config.num_hidden_layers} layers attend as "
            "they were told to; such a model cannot be trained on packed sequences"
        )
    return out[0]


def _attend(
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
    """As transformers calls it: query [1, heads, N, D], key and value [1, fewer heads, N, D]."""
    if forest is None or attention_mask is not None:
        raise ValueError("this model attends by forests alone: call it through hidden_states()")
    odd = [name for name in _NEVER if kwargs.get(name) is not None]
    if odd or dropout or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{type(module).__name__}: attention with {odd or 'dropout, or that is not causal'}")
    if sliding_window and forest.depth > sliding_window:
        raise ValueError(
            f"{type(module).__name__} sees the last {sliding_window} tokens alone, and a sequence has "
            f"{forest.depth}: not supported"
        )
    forest.layers += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_blocks(query, key, value, forest.nodes, scale).transpose(1, 2), None


AttentionInterface.register(BLOCKS, _attend)
