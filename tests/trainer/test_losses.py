"""Each loss with its gradient against the slow float64 reference, on ragged batches; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from polar_mitm_trainer.config import LossConfig
from polar_mitm_trainer.kl import kl_terms
from polar_mitm_trainer.loss_defaults import DEFAULTS, resolve
from polar_mitm_trainer.losses import LOSSES
from polar_mitm_trainer.metrics import combine, means
from polar_mitm_trainer.token_batch import BadSamplesError, TokenBatch
from tests.trainer import float64

NAMES = sorted(DEFAULTS)
CORRECTIONS = ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
PLACES = ["logprobs", "old_logprobs", "behaviour_logprobs", "reference_logprobs", "advantages", "weights"]
Trajectories = list[list[float64.Token]]


def trajectories(seed: int, lengths: list[int]) -> Trajectories:
    """Ragged ones, on both sides of every clip: advantages of either sign, some of single calls."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        near = rng.normal(-1.5, 1.0, length)
        spread = rng.choice([0.02, 0.3, 1.0])
        noise = rng.normal(0, spread, (4, length))
        advantage = rng.normal(0, 1, length if rng.random() < 0.3 else 1)
        columns = [near + each for each in noise]
        made.append(
            [
                float64.Token(p, p, b, o, r, a, w)
                for p, b, o, r, a, w in zip(
                    *columns, np.resize(advantage, length), rng.uniform(0, 0.2, length), strict=True
                )
            ]
        )
    return made


def batch(given: Trajectories, seed: int = 0, dtype: torch.dtype = torch.float64) -> TokenBatch:
    """As one micro-batch, whose tokens lie in any order."""
    rows = [(number, token) for number, tokens in enumerate(given) for token in tokens]
    order = np.random.default_rng(seed).permutation(len(rows))
    rows = [rows[at] for at in order]
    column = lambda name: torch.tensor([getattr(token, name) for _, token in rows], dtype=dtype)  # noqa: E731
    return TokenBatch(
        logprobs=column("logprob").requires_grad_(),
        behaviour_logprobs=column("behaviour"),
        old_logprobs=column("old"),
        reference_logprobs=column("reference"),
        advantages=column("advantage"),
        weights=column("weight"),
        samples=torch.tensor([number for number, _ in rows]),
        num_samples=len(given),
    )


def rules(config: LossConfig) -> float64.Rules:
    config = resolve(config)
    return float64.Rules(
        name=config.name,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        old_policy=config.old_policy,
        kl_coefficient=config.kl_coefficient,
        kl_estimator=config.kl_estimator,
        correction=config.correction,
        cap=config.correction_cap,
        floor=config.correction_floor,
    )


CONFIGS = st.builds(
    dict,
    name=st.sampled_from(NAMES),
    clip_low=st.none() | st.floats(0, 1),
    clip_high=st.none() | st.floats(0, 3),
    old_policy=st.sampled_from(["behaviour", "recomputed"]),
    kl_coefficient=st.sampled_from([0.0, 0.1]),
    kl_estimator=st.sampled_from(["k1", "k3"]),
    correction=st.sampled_from(CORRECTIONS),
    correction_cap=st.floats(1, 3),
    correction_floor=st.sampled_from([0.0, 0.5]),
).filter(lambda c: c["old_policy"] == "recomputed" or not c["correction"].endswith("truncate"))
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@settings(deadline=None, max_examples=100)
@given(CONFIGS, SHAPES, st.integers(0, 2**32 - 1))
def test_loss_and_gradient_equal_the_reference(given: dict[str, Any], lengths: list[int], seed: int) -> None:
    config, made = LossConfig(**given), trajectories(seed, lengths)
    tokens = batch(made)
    output = LOSSES[config.name](tokens, config)
    output.loss.backward()
    known = rules(config)
    assert output.loss.item() == pytest.approx(float64.loss(made, known), rel=1e-9, abs=1e-12)
    slopes = batch([[replace(t, logprob=float64.slope(each, t, known)) for t in each] for each in made])
    assert tokens.logprobs.grad is not None
    np.testing.assert_allclose(tokens.logprobs.grad, slopes.logprobs.detach(), rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(NAMES), st.lists(SHAPES, min_size=2, max_size=3), st.integers(0, 999))
def test_micro_batches_add_up(name: str, shapes: list[list[int]], seed: int) -> None:
    """Loss, gradient and metrics are the same however whole samples are dealt out."""
    config = LossConfig(name=name, kl_coefficient=0.1, correction="sequence_mask", old_policy="recomputed")
    parts = [trajectories(seed + at, shape) for at, shape in enumerate(shapes)]
    outputs = [LOSSES[name](batch(part), config) for part in parts]
    whole = LOSSES[name](batch([each for part in parts for each in part]), config)
    assert sum(each.loss.item() for each in outputs) == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-12)
    assert means(combine(each.metrics for each in outputs)) == pytest.approx(means(whole.metrics))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_finite_differences(name: str) -> None:
    """Of the code itself, where no gradient is stopped half-way: one advantage and weight per sample."""
    made = [
        [replace(t, advantage=each[0].advantage, weight=each[0].weight) for t in each]
        for each in trajectories(3, [3, 1, 5])
    ]
    tokens = batch(made)
    config = LossConfig(
        name=name, kl_coefficient=0.2, old_policy="recomputed", correction="sequence_truncate"
    )
    if name == "cispo":  # its weight is a constant by design: on either side of the clip, the same
        config = config.model_copy(update={"clip_low": 0.0, "clip_high": 0.0})

    def loss(p: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](replace(tokens, logprobs=p), config).loss

    assert torch.autograd.gradcheck(loss, tokens.logprobs)


def test_the_metrics_say_what_happened() -> None:
    token = partial(float64.Token, held=0.0, reference=-1.0, weight=0.25)
    made = [
        [
            token(logprob=-1.0, behaviour=-1.0, old=-1.0, advantage=1.0),
            token(logprob=-1.0, behaviour=-2.0, old=-2.0, advantage=1.0),  # ratio e, clipped from above
        ],
        [
            token(logprob=-1.0, behaviour=-2.0, old=-2.0, advantage=-1.0),  # ratio e: gradient goes on
            token(logprob=-2.0, behaviour=-3.5, old=-1.0, advantage=-1.0),  # 1/e, clipped; mismatch 2.5
        ],
    ]
    tokens = replace(batch(made), entropy=torch.tensor([1.0, 2.0, 3.0, 6.0]))
    config = LossConfig(old_policy="recomputed", correction="token_mask", correction_cap=2.0)
    found = means(LOSSES["grpo"](tokens, config).metrics)
    e = np.e
    assert found == pytest.approx(
        {
            "num_tokens": 4,
            "ratio": (1 + 2 * e + 1 / e) / 4,
            "ratio_max": e,
            "clipped_low": 0.25,
            "clipped_high": 0.25,
            "kl": (1 / e * 0 + (e - 1 - 1)) / 4,
            "entropy": 3.0,
            "mismatch_abs": 2.5 / 4,
            "mismatch_abs_max": 2.5,
            "mismatch_k1": -2.5 / 4,
            "mismatch_k3": (e**2.5 - 1 - 2.5) / 4,
            "mismatch_outside": 0.25,
            "correction": 3 / 4,
            "corrected": 0.25,
        }
    )


def test_without_old_logprobs_this_is_the_first_update() -> None:
    tokens = replace(batch(trajectories(1, [4, 2])), old_logprobs=None)
    found = means(LOSSES["dapo"](tokens, LossConfig(name="dapo", old_policy="recomputed")).metrics)
    assert found["ratio"] == found["ratio_max"] == 1.0
    assert found["mismatch_abs"] > 0, "the engine's are others"


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_a_kl_term_pulls_towards_the_reference(estimator: Any) -> None:
    """On samples of the learner itself, value and gradient are on average those of the exact KL."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, dtype=torch.float64).log_softmax(0)
    learner = logits.log_softmax(0)
    exact = (learner.exp() * (learner - reference)).sum()
    (known,) = torch.autograd.grad(exact, logits, retain_graph=True)
    terms = kl_terms(learner, reference, estimator)
    expected = (learner.detach().exp() * terms).sum()
    (found,) = torch.autograd.grad(expected, logits)
    assert expected.item() == pytest.approx(exact.item())
    if estimator == "k1":
        torch.testing.assert_close(found, known)
    else:  # that of KL(reference || learner), which pulls there too
        torch.testing.assert_close(found, learner.detach().exp() - reference.exp())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_by_sample(place: str, bad: float) -> None:
    tokens = batch(trajectories(1, [2, 3, 4, 1]))
    getattr(tokens, place).data[(tokens.samples == 1) | (tokens.samples == 3)] = bad
    with pytest.raises(BadSamplesError, match=f"NaN or infinity in {place} of samples 1, 3$") as caught:
        LOSSES["grpo"](tokens, LossConfig())
    assert caught.value.samples == (1, 3) and isinstance(caught.value, ValueError)
    assert tokens.logprobs.grad is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("old_policy", ["behaviour", "recomputed"])
def test_absurd_ratios_stay_finite(name: str, old_policy: Any) -> None:
    """In float32, and with any advantage: exp(500) is beyond it."""
    token = partial(float64.Token, held=0.0, weight=0.1)
    made = [
        [
            token(logprob=-0.1, behaviour=-500.0, old=-500.0, reference=-500.0, advantage=sign),
            token(logprob=-500.0, behaviour=-0.1, old=-0.1, reference=-0.1, advantage=sign),
        ]
        for sign in (1.0, -1.0, 0.0)
    ]
    tokens = batch(made, dtype=torch.float32)
    config = LossConfig(name=name, kl_coefficient=0.1, correction="token_mask", old_policy=old_policy)
    output = LOSSES[name](tokens, config)
    output.loss.backward()
    assert (
        output.loss.isfinite() and tokens.logprobs.grad is not None and tokens.logprobs.grad.isfinite().all()
    )
    assert all(np.isfinite(value) for value in means(output.metrics).values())


def test_a_micro_batch_without_trained_tokens_is_nothing() -> None:
    tokens = batch(trajectories(1, [1]))
    empty = TokenBatch(**{name: getattr(tokens, name)[:0] for name in (*PLACES, "samples")}, num_samples=0)
    for name in NAMES:
        output = LOSSES[name](empty, LossConfig(name=name))
        assert output.loss.item() == 0 and output.loss.requires_grad
        assert set(means(output.metrics).values()) == {0.0}


def test_a_kl_term_needs_a_reference() -> None:
    tokens = replace(batch(trajectories(1, [2])), reference_logprobs=None)
    with pytest.raises(ValueError, match="reference"):
        LOSSES["grpo"](tokens, LossConfig(kl_coefficient=0.1))


def test_what_the_ratio_holds_already_is_not_truncated_again() -> None:
    with pytest.raises(ValidationError, match="needs old_policy = 'recomputed'"):
        LossConfig(old_policy="behaviour", correction="token_truncate")


def test_each_loss_has_its_own_defaults_and_a_configuration_overrides_them() -> None:
    dapo = resolve(LossConfig(name="dapo", clip_low=0.1))
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregation) == (0.1, 0.28, "token")
    assert resolve(dapo) == dapo
    assert set(LOSSES) == set(DEFAULTS)
