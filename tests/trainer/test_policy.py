"""The policy against plain transformers, adapters against all weights, AdamW and masters against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from polar_mitm_trainer.config import OptimiserConfig, PolicyConfig
from polar_mitm_trainer.distributed import Distributed
from polar_mitm_trainer.microbatch import MicroBatch
from polar_mitm_trainer.optimiser import Optimiser
from polar_mitm_trainer.packing import pack
from polar_mitm_trainer.policy import Policy
from polar_mitm_trainer.samples import Sample
from tests.trainer.policies import SHAPE, TIED, UNTIED, plain, plain_logprobs, policy_folder, samples_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # tiny tensors
    return policy_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def samples(model: Path) -> list[Sample]:
    return samples_for(model)


def policy(model: Path, **options: object) -> Policy:
    return Policy(PolicyConfig.model_validate({"model": str(model), **options}), Distributed(), seed=1)


def forest(samples: list[Sample]) -> MicroBatch:
    """All of them in one micro-batch."""
    (batch,) = pack(samples, max_tokens=10_000, tree=True)
    return batch


def gradients(policy: Policy, batch: MicroBatch) -> dict[str, Tensor]:
    """Of a sum that no two tokens count alike in."""
    policy.zero_grad()
    logprobs, _ = policy(batch)
    (logprobs * torch.linspace(-1, 1, logprobs.numel(), dtype=logprobs.dtype)).sum().backward()
    return {name: each.grad for name, each in policy.trained().items() if each.grad is not None}


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_forest_scores_as_plain_transformers_scores_each_sequence(
    tmp_path: Path, config: LlamaConfig
) -> None:
    folder = policy_folder(tmp_path, config)
    samples = samples_for(folder)
    batch = forest(samples)
    logprobs, entropy = policy(folder)(batch, with_entropy=True)
    reference = plain(folder)
    for number, index in enumerate(batch.sample_indices):
        expected = plain_logprobs(reference, samples[index].token_ids)[samples[index].loss_mask == 1]
        torch.testing.assert_close(logprobs[batch.samples == number], expected, atol=2e-5, rtol=0)
    assert logprobs.std() > 0.3 and entropy is not None and entropy.min() > 0


def test_gradient_checkpointing_changes_no_gradient_and_wakes_no_dropout(
    tmp_path: Path, samples: list[Sample]
) -> None:
    folder = policy_folder(tmp_path, LlamaConfig(**SHAPE, attention_dropout=0.5, tie_word_embeddings=False))
    whole, thrifty = policy(folder), policy(folder, gradient_checkpointing=True)
    calls = []
    for layer in thrifty.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    expected, found = (gradients(each, forest(samples)) for each in (whole, thrifty))
    assert len(calls) == 2 * len(thrifty.model.model.layers), "each layer was computed again"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_adapters_begin_as_the_model_and_alone_train(model: Path, samples: list[Sample]) -> None:
    batch = forest(samples)
    adapted = policy(model, lora={"rank": 4})
    torch.testing.assert_close(adapted(batch)[0], policy(model)(batch)[0])
    assert adapted.trained() and all(".lora_" in name for name in adapted.trained())
    for name, each in adapted.trained().items():
        if "lora_B" in name:
            torch.nn.init.normal_(each)
    with adapted.without_adapters():
        torch.testing.assert_close(adapted(batch)[0], policy(model)(batch)[0])
    assert not torch.allclose(adapted(batch)[0], policy(model)(batch)[0], atol=0.1)


def test_adapters_of_full_rank_learn_what_all_weights_learn(model: Path, samples: list[Sample]) -> None:
    """Gradient descent with rate r moves W by -r G, and W + B A, through B alone, by -r G A' A. That is the
    same where A' A = 1, which takes a rank of the number of inputs. So every step agrees, in float64."""
    rank, rate = max(SHAPE["hidden_size"], SHAPE["intermediate_size"]), 0.05
    full, adapted = policy(model), policy(model, lora={"rank": rank, "alpha": rank})
    full.double(), adapted.double()
    linear = {n.removesuffix(".lora_B.default.weight") for n in adapted.trained() if "lora_B" in n}
    assert len(linear) == 7 * SHAPE["num_hidden_layers"]
    for name, each in full.trained().items():
        each.requires_grad_(name.removesuffix(".weight") in linear)
    for name, each in adapted.trained().items():
        if "lora_A" in name:
            each.data = torch.linalg.qr(torch.randn(each.shape, dtype=torch.float64)).Q
            each.requires_grad_(False)
    batch = forest(samples)
    before = full(batch)[0]
    for _ in range(3):
        for each in (full, adapted):
            moves = gradients(each, batch)
            with torch.no_grad():
                for name, parameter in each.trained().items():
                    parameter -= rate * moves[name]
    torch.testing.assert_close(adapted(batch)[0], full(batch)[0], atol=1e-9, rtol=0)
    merged = adapted.merged(dict(adapted.model.named_parameters()))
    for name in linear:
        expected = full.model.get_submodule(name).weight
        torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-10, rtol=0)
    assert (full(batch)[0] - before).abs().max() > 0.5, "there was something to learn"


def test_adapters_on_other_than_linear_layers_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="embed_tokens is a Embedding; adapters go on linear layers alone"):
        policy(model, lora={"target_modules": ["embed_tokens"]})


def test_an_adapter_is_no_policy_to_start_from(model: Path, tmp_path: Path) -> None:
    adapters = policy(model, lora={"rank": 2}).adapters
    assert adapters is not None
    adapters.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(ValueError, match="is an adapter: train on from its merged export"):
        policy(tmp_path)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Unrecognized model"):
        policy(tmp_path)


def test_updates_too_small_for_bfloat16_add_up(model: Path) -> None:
    """Each update is 1e-3 of a weight's size; half of bfloat16's step is 4e-3 of it."""
    rounded = policy(model, dtype="bfloat16")
    parameter = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimiser = Optimiser({"w": parameter}, OptimiserConfig(lr=1e-3))
    for _ in range(40):
        (parameter.float().sum()).backward()
        assert parameter.grad is None, "gradients are kept in float32"
        optimiser.update(1e-3, optimiser.grad_norm())
    torch.testing.assert_close(optimiser.masters["w"], torch.full((4, 4), 0.96), atol=1e-5, rtol=0)
    torch.testing.assert_close(parameter.detach().float(), torch.full((4, 4), 0.96), atol=4e-3, rtol=0)
    assert {each.dtype for each in rounded.trained().values()} == {torch.bfloat16}


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    optimiser = Optimiser({"w": parameter}, OptimiserConfig())
    for _ in range(1000):  # in bfloat16 the sum would stay at 256
        parameter.sum().backward()
    assert optimiser.grad_norm() == 1000.0


def test_the_rate_warms_up_and_stays() -> None:
    optimiser = Optimiser(
        {"w": torch.nn.Parameter(torch.ones(1, 1))}, OptimiserConfig(lr=1.0, warmup_steps=4)
    )
    assert [optimiser.rate(step) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Optimiser({"w": torch.nn.Parameter(torch.ones(1, 1))}, OptimiserConfig(lr=1.0)).rate(1) == 1.0


def test_an_update_is_what_torch_does_with_clipped_gradients() -> None:
    rng = np.random.default_rng(0)
    shapes = {"matrix": (3, 5), "norm": (5,)}
    start = {name: torch.from_numpy(rng.normal(size=shape)).float() for name, shape in shapes.items()}
    ours = {name: torch.nn.Parameter(each.clone()) for name, each in start.items()}
    theirs = {name: torch.nn.Parameter(each.clone()) for name, each in start.items()}
    config = OptimiserConfig(lr=0.1, weight_decay=0.3, max_grad_norm=0.7)
    optimiser = Optimiser(ours, config)
    reference = torch.optim.AdamW(
        [{"params": [theirs["matrix"]]}, {"params": [theirs["norm"]], "weight_decay": 0.0}],
        lr=0.1, betas=config.betas, eps=config.eps, weight_decay=0.3,
    )  # fmt: skip
    for _ in range(3):
        for name, shape in shapes.items():
            gradient = torch.from_numpy(rng.normal(size=shape)).float()
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
        reference.step()
        assert optimiser.grad_norm() == pytest.approx(float(norm))
        optimiser.update(0.1, optimiser.grad_norm())
    for name in shapes:
        torch.testing.assert_close(ours[name], theirs[name])
