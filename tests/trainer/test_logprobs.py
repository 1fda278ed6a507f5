"""Logprobs in chunks against the whole logits, with gradients, for each kind of head; and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from polar_mitm_trainer.logprobs import Head, token_logprobs

M, H, V = 23, 8, 31
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "soft-capped": Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
    "multiplied": CohereConfig(**SHAPE, logit_scale=0.25),
    "divided": GraniteConfig(**SHAPE, logits_scaling=4.0),
}


class Adapted(nn.Module):
    """A linear layer with more to it, as peft makes them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


HEADS: dict[str, Callable[[nn.Linear], Head]] = {
    "plain": Head,
    "shaped": lambda linear: Head(linear, scale=0.5, softcap=1.5),
    "called": lambda linear: Head(Adapted(linear)),
    "called and shaped": lambda linear: Head(Adapted(linear), scale=0.5, softcap=1.5),
}


def case(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(1)
    linear = nn.Linear(H, V, bias=bias, dtype=dtype)
    return torch.randn(M, H, dtype=dtype, requires_grad=True), torch.randint(V, (M,)), linear


def whole(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """All logits at once."""
    logits = head.module(hidden) * head.scale
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, M, 1000])
def test_chunks_equal_the_whole(kind: str, bias: bool, chunk: int) -> None:
    """Values, entropies, and gradients of hidden states, weight and bias, each token weighing otherwise."""
    hidden, targets, linear = case(bias)
    head = HEADS[kind](linear)
    inputs = [hidden, *linear.parameters()]
    weights = torch.randn(M, dtype=torch.float64)
    known, known_entropy = whole(hidden, targets, head)
    found, entropy = token_logprobs(hidden, targets, head, chunk=chunk, with_entropy=True)
    assert entropy is not None and not entropy.requires_grad
    torch.testing.assert_close(found, known)
    torch.testing.assert_close(entropy, known_entropy)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((known * weights).sum(), inputs),
    )


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_by_finite_differences(kind: str) -> None:
    hidden, targets, linear = case()
    head = HEADS[kind](linear)

    def logprobs(*_: Tensor) -> Tensor:  # gradcheck moves the parameters themselves
        return token_logprobs(hidden, targets, head, chunk=8)[0]

    assert torch.autograd.gradcheck(logprobs, (hidden, linear.weight, linear.bias), fast_mode=True)


@pytest.mark.parametrize("trains", [(True, False), (False, True)])
@pytest.mark.parametrize("kind", HEADS)
def test_what_is_frozen_costs_no_gradient(kind: str, trains: tuple[bool, bool]) -> None:
    hidden, targets, linear = case()
    hidden.requires_grad_(trains[0])
    linear.requires_grad_(trains[1])
    token_logprobs(hidden, targets, HEADS[kind](linear), chunk=5)[0].sum().backward()
    assert (hidden.grad is not None, linear.weight.grad is not None) == trains
    with torch.no_grad():
        assert not token_logprobs(hidden, targets, HEADS[kind](linear), chunk=5)[0].requires_grad


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
@pytest.mark.parametrize("kind", ["plain", "shaped"])
def test_bfloat16_weights_have_float32_logits(kind: str, device: str) -> None:
    """As near to float64 on the same weights as a float32 softmax is; only gradients are rounded."""
    hidden, targets, linear = case(dtype=torch.bfloat16)
    hidden = hidden.detach().to(device).requires_grad_()
    targets, linear = targets.to(device), linear.to(device)
    found, entropy = token_logprobs(hidden, targets, HEADS[kind](linear), chunk=5, with_entropy=True)
    gradient, weight_gradient = torch.autograd.grad(found.sum(), [hidden, linear.weight])
    assert entropy is not None and found.dtype == entropy.dtype == torch.float32
    assert gradient.dtype == weight_gradient.dtype == torch.bfloat16
    exact = hidden.detach().double().requires_grad_()
    known, known_entropy = whole(exact, targets, HEADS[kind](linear.double()))
    torch.testing.assert_close(found.double(), known, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), known_entropy, rtol=1e-5, atol=1e-5)
    known_gradients = torch.autograd.grad(known.sum(), [exact, linear.weight])
    for each, of_it in (gradient, known_gradients[0]), (weight_gradient, known_gradients[1]):
        torch.testing.assert_close(each.double(), of_it, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", HEADS)
def test_nothing_has_no_logprobs_and_a_gradient(kind: str) -> None:
    hidden, targets, linear = case()
    found, entropy = token_logprobs(hidden[:0], targets[:0], HEADS[kind](linear), chunk=5, with_entropy=True)
    assert entropy is not None and found.shape == entropy.shape == (0,)
    found.sum().backward()
    assert linear.weight.grad is not None and not linear.weight.grad.any()


@pytest.mark.parametrize("name", MODELS)
def test_the_head_of_a_model_is_what_the_model_does(name: str) -> None:
    """Also where its weight is the embedding: gradients of all the model's weights are the same."""
    config: PretrainedConfig = MODELS[name]
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).double()
    ids = torch.randint(97, (1, 40))
    targets = ids[0, 1:]
    known = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    hidden = model.model(input_ids=ids).last_hidden_state[0, :-1]
    found, _ = token_logprobs(hidden, targets, Head.of(model), chunk=16)
    torch.testing.assert_close(found, known)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), parameters), torch.autograd.grad(known.sum(), parameters)
    )


class Largest(TorchDispatchMode):
    """The most elements that any result of an operation had."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return result


@pytest.mark.parametrize("kind", HEADS)
def test_no_more_than_a_chunk_of_logits_exists(kind: str) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(4, 500, dtype=torch.float64)
    hidden = torch.randn(200, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(500, (200,))
    with Largest() as seen:
        found, _ = token_logprobs(hidden, targets, HEADS[kind](linear), chunk=10, with_entropy=True)
        found.sum().backward()
    assert seen.numel == 10 * 500
