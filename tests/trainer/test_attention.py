"""Attention over forests gives what each sequence alone gives, and refuses what it would get wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from polar_mitm_trainer import attention_blocks, attention_kernels
from polar_mitm_trainer.attention import hidden_states, use_forest_attention
from polar_mitm_trainer.attention_blocks import block_attention
from polar_mitm_trainer.attention_flex import block_mask, flex_attention_over
from polar_mitm_trainer.microbatch import Node
from polar_mitm_trainer.packing import pack
from polar_mitm_trainer.samples import Sample
from tests.trainer.forests import CONFIGS, SHAPE, alone, backward, groups, model, sample, score

torch.set_num_threads(1)  # tiny tensors
PLAIN = {name: model(config) for name, config in CONFIGS.items()}
FOREST = {name: model(config) for name, config in CONFIGS.items()}
for each in FOREST.values():
    use_forest_attention(each)

TURNS = [sample(n, [*range(40), *[n] * (9 + n), *range(30)], range(38, 60 + n)) for n in range(4)]
TURNS += [sample(4, range(20), [5, 19]), sample(5, [50, 3, 50], [2]), sample(6, [*TURNS[1].token_ids], [70])]

WINDOW = {"use_sliding_window": True, "max_window_layers": 1}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


def packed(name: str, samples: list[Sample], **how: int) -> tuple[float, torch.Tensor]:
    net = FOREST[name]
    batches = list(pack(samples, **{"max_tokens": 200, "tree": True, **how}))
    return backward(net, lambda: ((score(net, b) * b.advantages * b.weights).sum() for b in batches))


def one_by_one(name: str, samples: list[Sample]) -> tuple[float, torch.Tensor]:
    net = PLAIN[name]
    factors = [each.advantages.astype(np.float64) * each.weights for each in samples]
    terms = [(e, torch.from_numpy(f[e.loss_mask > 0])) for e, f in zip(samples, factors, strict=True)]
    return backward(net, lambda: ((alone(net, each) * factor).sum() for each, factor in terms))


@pytest.mark.parametrize("name", CONFIGS)
@given(samples=groups(), worth=st.sampled_from([0, 16]))
@settings(max_examples=15, deadline=None)
def test_loss_and_gradients_are_those_of_each_sequence_alone(
    name: str, samples: list[Sample], worth: int
) -> None:
    samples = [each for each in samples if each.num_trained] or [sample(0, [1, 2], [1])]
    loss, gradient = one_by_one(name, samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polar_mitm_trainer.packing._WORTH_A_FORK", worth)
        for how in ({}, {"tree": False}, {"max_tokens": 37}):
            got, found = packed(name, samples, **how)
            assert abs(got - loss) < 1e-10
            assert (found - gradient).abs().max() < 1e-10


def test_gradient_checkpointing_and_plain_kernels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, gradient = one_by_one("qwen3", TURNS)
    net = FOREST["qwen3"].train()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = packed("qwen3", TURNS)
    net.gradient_checkpointing_disable()
    plain = attention_kernels.plain_forward, attention_kernels.plain_backward
    monkeypatch.setattr(attention_blocks, "kernel_for", lambda query: plain)
    monkeypatch.setattr(attention_kernels, "_ROWS", 7)
    for got, found in (checkpointed, packed("qwen3", TURNS)):
        assert abs(got - loss) < 1e-10
        assert (found - gradient).abs().max() < 1e-10


def test_a_branch_has_no_part_in_another() -> None:
    (batch,) = pack(TURNS, max_tokens=1000, tree=True)
    net = FOREST["llama"]
    with torch.no_grad():
        before = hidden_states(net, batch)
        for node in batch.nodes:
            batch.token_ids[node.start : node.end] += 1
            changed = (hidden_states(net, batch) != before).any(1)
            batch.token_ids[node.start : node.end] -= 1
            assert changed.nonzero().flatten().tolist() == list(range(node.start, node.subtree_end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_errs_no_more_than_alone(dtype: torch.dtype) -> None:
    exact = [alone(PLAIN["qwen3"], each).detach() for each in TURNS]
    lone = model(CONFIGS["qwen3"], dtype)
    error = max((alone(lone, each) - right).abs().max() for each, right in zip(TURNS, exact, strict=True))
    use_forest_attention(lone)
    (batch,) = pack(TURNS, max_tokens=1000, tree=True)
    got = score(lone, batch)
    assert got.dtype == dtype
    for number, index in enumerate(batch.sample_indices):
        assert (got[batch.samples == number] - exact[index]).abs().max() < 2 * error


def test_adapters_train_through_it() -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    lone, forest = (get_peft_model(model(CONFIGS["qwen3"]), config) for _ in range(2))
    forest.load_state_dict(lone.state_dict())
    use_forest_attention(forest)
    (batch,) = pack(TURNS, max_tokens=1000, tree=True)
    loss, gradient = backward(lone, lambda: (alone(lone, each).sum() for each in TURNS))
    got, found = backward(forest, lambda: [score(forest, batch).sum()])
    assert abs(got - loss) < 1e-9 and (found - gradient).abs().max() < 1e-9


def random_nodes(lengths: list[int], ups: list[int]) -> list[Node]:
    """A forest in depth-first order: each node a child of the one before, or of one `ups` above that."""
    depths = list(itertools.accumulate(ups, lambda depth, up: max(0, depth + 1 - up), initial=0))[
        : len(lengths)
    ]
    starts = [0, *itertools.accumulate(lengths)]
    nodes = []
    for at, depth in enumerate(depths):
        after = next((n for n in range(at + 1, len(depths)) if depths[n] <= depth), len(depths))
        nodes.append(Node(starts[at], starts[at + 1], starts[after]))
    return nodes


def sees(nodes: list[Node]) -> torch.Tensor:
    """The mask [N, N] that the forest means."""
    mask = torch.zeros(nodes[-1].end, nodes[-1].end, dtype=torch.bool)
    for node in nodes:
        mask[node.start : node.subtree_end, node.start : node.end] = True
    return mask.tril()


forests = st.builds(
    random_nodes,
    st.lists(st.sampled_from([1, 2, 60, 127, 128, 129, 200]), min_size=1, max_size=9),
    st.lists(st.integers(0, 4), min_size=9, max_size=9),
)


@given(forests)
@settings(max_examples=12, deadline=None)
def test_flex_and_blocks_are_the_masked_softmax(nodes: list[Node]) -> None:
    size = nodes[-1].end
    torch.manual_seed(size)
    query, key, value = (torch.randn(1, heads, size, 16) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), sees(nodes), scale=0.3, enable_gqa=True
    )
    with torch.no_grad():
        flex = flex_attention_over(nodes, torch.device("cpu"))(query, key, value, 0.3)
        blocks = block_attention(nodes)(query, key, value, 0.3)
    assert (flex - expected).abs().max() < 1e-5
    assert (blocks - expected).abs().max() < 1e-5


@given(forests)
@settings(max_examples=50, deadline=None)
def test_the_block_mask_names_what_is_seen(nodes: list[Node]) -> None:
    mask = block_mask(nodes, torch.device("cpu"))
    size = nodes[-1].end
    num = -(-size // 128)
    some, every = torch.zeros(num, num, dtype=torch.bool), torch.zeros(num, num, dtype=torch.bool)
    for counts, which, into in (
        (mask.kv_num_blocks, mask.kv_indices, some),
        (mask.full_kv_num_blocks, mask.full_kv_indices, every),
    ):
        for row in range(num):
            into[row, which[0, 0, row, : counts[0, 0, row]].long()] = True
    padded = torch.nn.functional.pad(sees(nodes), (0, -size % 128, 0, -size % 128))
    tiles = padded.unflatten(0, (num, 128)).unflatten(2, (num, 128))
    assert not (some & every).any()
    assert torch.equal(some | every, tiles.any(3).any(1))
    assert torch.equal(every, tiles.all(3).all(1))


def refused(config: PreTrainedConfig, why: str, *, train: bool = False) -> None:
    net = model(config, torch.float32).train(train)
    (batch,) = pack(TURNS, max_tokens=1000, tree=True)
    with pytest.raises(ValueError, match=why):
        use_forest_attention(net)
        hidden_states(net, batch)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Gemma2Config(**SHAPE), "softcap"),
        (GptOssConfig(**SHAPE, num_local_experts=2), "s_aux"),
        (Qwen2Config(**SHAPE, **WINDOW, sliding_window=32), "window of 32"),
        (Qwen2Config(**SHAPE, rope_parameters=ROPE), "beyond 64"),
        (Llama4TextConfig(**SHAPE, num_local_experts=2), "chunked_attention"),
        (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), "conv"),
        (BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "of its own"),
    ],
    ids=lambda each: each.model_type if isinstance(each, PreTrainedConfig) else "",
)  # fmt: skip
def test_models_that_would_be_wrong_are_refused(config: PreTrainedConfig, why: str) -> None:
    refused(config, why)


def test_dropout_is_refused_while_it_is_on() -> None:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)
    refused(config, "dropout", train=True)
    net, lone = (model(config, torch.float32).eval() for _ in range(2))
    use_forest_attention(net)
    for batch in pack(TURNS[:1], max_tokens=1000, tree=True):
        assert (score(net, batch) - alone(lone, TURNS[0])).abs().max() < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SHAPE, **WINDOW, sliding_window=84),
        DeepseekV3Config(
            **{**SHAPE, "num_key_value_heads": 4}, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2,
        ),
    ],
    ids=["window not reached", "narrower values"],
)  # fmt: skip
def test_others_are_exact(config: PreTrainedConfig) -> None:
    lone = model(config)
    forest = model(config)
    use_forest_attention(forest)
    (batch,) = pack(TURNS, max_tokens=1000, tree=True)
    assert batch.position_ids.max() < 84
    loss, gradient = backward(lone, lambda: (alone(lone, each).sum() for each in TURNS))
    got, found = backward(forest, lambda: [score(forest, batch).sum()])
    assert abs(got - loss) < 1e-9 and (found - gradient).abs().max() < 1e-9


def test_a_model_is_not_used_half_prepared() -> None:
    net = model(Qwen3Config(**SHAPE))
    (batch,) = pack(TURNS, max_tokens=1000, tree=True)
    with pytest.raises(ValueError, match="use_forest_attention first"):
        hidden_states(net, batch)
    use_forest_attention(net, "flex")
    with torch.no_grad():
        assert (score(net.float(), batch) - score(FOREST["qwen3"], batch)).abs().max() > 0
    with pytest.raises(ValueError, match="through hidden_states"):
        net(input_ids=batch.token_ids[None])
    with pytest.raises(ValueError, match="no Hugging Face model"):
        use_forest_attention(torch.nn.Linear(2, 2))


def test_a_layer_that_mixes_tokens_itself_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net = FOREST["llama"]
    (batch,) = pack(TURNS, max_tokens=1000, tree=True)
    itself = net.model.layers[1].self_attn
    monkeypatch.setattr(itself, "forward", lambda hidden_states, **_: (hidden_states.cumsum(1), None))
    with pytest.raises(ValueError, match="1 of 2 layers"):
        hidden_states(net, batch)
