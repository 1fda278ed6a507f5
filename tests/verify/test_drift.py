"""Drift and its estimators, and which tokens they are taken over."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from polar_mitm.types import ModelCall, Sampling
from polar_mitm.verify import Drift, Unscorable
from polar_mitm.verify.records import sampled
from tests.reconstruct.calls import call, follow
from tests.verify.paths import WEIGHTS, Table, conversation, recorded, verified

logprobs = arrays.arrays(np.float64, st.integers(1, 20), elements=st.floats(-20, 0))


def test_of_numbers_worked_by_hand() -> None:
    drift = Drift.of(np.array([-1.0, -2.0, -0.5]), np.array([-1.0, -2.5, -0.25]))
    assert (drift.num_tokens, drift.max, drift.mean) == (3, 0.5, pytest.approx(0.25))
    assert drift.bias == pytest.approx((0.5 - 0.25) / 3)
    k3 = [(math.exp(d) - 1) - d for d in (0.0, 0.5, -0.25)]
    assert drift.kl == pytest.approx(sum(k3) / 3)


def test_k3_estimates_the_divergence_of_the_scored_from_the_sampled_distribution() -> None:
    rng = np.random.default_rng(7)
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.2, 0.3])
    tokens = rng.choice(3, size=200_000, p=p)
    exact = float((p * np.log(p / q)).sum())
    assert Drift.of(np.log(q)[tokens], np.log(p)[tokens]).kl == pytest.approx(exact, rel=0.02)


def test_it_does_not_vanish_at_rounding() -> None:
    drift = Drift.of(np.array([-1.0 + 1e-6]), np.array([-1.0]))
    assert drift.kl == pytest.approx(5e-13, rel=1e-3)


@given(logprobs, logprobs)
def test_a_sum_is_that_of_all_tokens(one: np.ndarray, two: np.ndarray) -> None:
    noise = np.linspace(-0.5, 0.5, one.size), np.linspace(0.2, -0.1, two.size)
    summed = Drift.of(one + noise[0], one) + Drift.of(two + noise[1], two)
    whole = Drift.of(np.concatenate([one + noise[0], two + noise[1]]), np.concatenate([one, two]))
    assert summed.num_tokens == whole.num_tokens and summed.max == whole.max
    assert (summed.mean, summed.bias, summed.kl) == pytest.approx(
        (whole.mean, whole.bias, whole.kl), abs=1e-12
    )


@given(logprobs)
def test_nothing_adds_nothing(one: np.ndarray) -> None:
    drift = Drift.of(one * 0.9, one)
    assert drift + Drift() == Drift() + drift == drift
    assert Drift().kl is None


async def test_without_drift_all_tokens_are_scored_and_none_is_an_outlier() -> None:
    calls = conversation(3)
    report = await verified(calls, scorer=recorded(calls), weights=WEIGHTS, tolerance=0.0)
    assert report.sound
    assert (report.drift.num_tokens, report.drift.max, report.drift.kl) == (report.trained, 0.0, 0.0)
    assert [c.call_id for c in report.calls] == ["a", "b", "c"]


@given(st.data())
async def test_one_altered_logprob_is_found_at_its_place(data: st.DataObject) -> None:
    """In the record itself, so that trajectory and record agree."""
    calls = conversation(3)
    scorer = recorded(calls)
    nth = data.draw(st.integers(0, 2))
    index = data.draw(st.integers(0, len(calls[nth].behaviour_logprobs) - 1))
    calls[nth].behaviour_logprobs[index] -= 0.01
    report = await verified(calls, scorer=scorer, tolerance=1e-3)
    [outlier] = [c.outlier for c in report.calls if c.outlier]
    assert (outlier.call_id, outlier.index) == (calls[nth].call_id, index)
    assert outlier.position == len(calls[nth].prompt_token_ids) + index
    assert outlier.token_id == calls[nth].completion_token_ids[index]
    assert outlier.scored - outlier.recorded == pytest.approx(0.01)
    assert not report.sound and not report.differences


async def test_the_first_token_beyond_the_tolerance_is_named() -> None:
    calls = conversation(1)
    scorer = recorded(calls)
    off = np.array([0.0, 1e-4, 0.5, 0.9])
    calls[0].behaviour_logprobs = (calls[0].behaviour_logprobs - off).tolist()
    [found] = (await verified(calls, scorer=scorer, tolerance=1e-3)).calls
    assert found.outlier is not None and found.outlier.index == 2
    assert found.drift.max == pytest.approx(0.9)


async def test_other_weights_are_named_and_not_averaged_in() -> None:
    calls = conversation(3)
    calls[1] = msgspec.structs.replace(calls[1], policy_version="v2")
    scorer = recorded(calls)
    scorer.logprobs |= dict.fromkeys(calls[1].completion_token_ids, -30.0)
    report = await verified(calls, scorer=scorer, weights=WEIGHTS, tolerance=1e-3)
    assert report.unscored == {"other_weights": 3}
    assert [c.call_id for c in report.calls] == ["a", "c"]
    assert report.drift.max == 0.0 and report.sound


async def test_another_model_of_the_same_version_has_other_weights() -> None:
    calls = conversation(1, model_served="n")
    report = await verified(calls, scorer=recorded(calls), weights=WEIGHTS)
    assert report.unscored == {"other_weights": 4} and not report.calls


@pytest.mark.parametrize(("its", "ours", "same"), [("a", "a", True), ("a", "b", False), ("", "b", True)])
async def test_another_tokenizer_is_named(its: str, ours: str, same: bool) -> None:
    calls = conversation(1, tokenizer=its)
    report = await verified(calls, scorer=recorded(calls), weights=WEIGHTS, tokenizer=ours)
    assert report.unscored == ({} if same else {"other_tokenizer": 4})


async def test_weights_that_changed_inside_a_call_are_named() -> None:
    calls = conversation(2)
    calls[1] = msgspec.structs.replace(calls[1], policy_version_last="v2")
    report = await verified(calls, scorer=recorded(calls))
    assert report.unscored == {"mixed_weights": 3}
    assert [c.call_id for c in report.calls] == ["a"]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.5), Sampling(top_p=0.9), Sampling(top_k=5)])
async def test_tempered_calls_count_for_drift_but_not_for_the_divergence(sampling: Sampling) -> None:
    calls = conversation(2)
    calls[1] = msgspec.structs.replace(calls[1], sampling=sampling)
    report = await verified(calls, scorer=recorded(calls))
    assert (report.drift.num_tokens, report.drift.num_kl_tokens) == (7, 4)
    assert report.calls[1].drift.kl is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"tool_choice": "required"}', "constrained"),
        (b'{"tool_choice": {"type": "function", "function": {"name": "f"}}}', "constrained"),
        (b'{"tool_choice": "auto", "response_format": {"type": "json_schema"}}', "constrained"),
        (b'{"structured_outputs": {"regex": "a*"}}', "constrained"),
        (b'{"tool_choice": "auto", "messages": []}', None),
        (b'{"tool_choice": "none"}', None),
        (b"{", None),
        (b"", None),
    ],
)
async def test_what_was_sampled_under_a_grammar_is_named(body: bytes, reason: str | None) -> None:
    """vLLM masks logits before it takes raw logprobs."""
    calls = conversation(1, upstream_body=body)
    report = await verified(calls, scorer=recorded(calls), weights=WEIGHTS)
    assert report.unscored == ({reason: 4} if reason else {})
    assert bool(report.calls) is (reason is None)


def test_a_grammar_is_known_without_the_body() -> None:
    guided, free = (
        call("a", [1], [2], notes=[note]) for note in ("guided:json_schema", "unguided:json_schema")
    )
    assert sampled(guided).constrained and not sampled(free).constrained


async def test_masked_calls_are_not_scored() -> None:
    calls = [*conversation(1), call("t", [1, 2], [3, 4], role="auxiliary", model_served="m")]
    scorer = recorded(calls)
    report = await verified(calls, scorer=scorer)
    assert [c.call_id for c in report.calls] == ["a"]
    assert scorer.asked == [calls[0].prompt_token_ids + calls[0].completion_token_ids]


async def test_a_shared_call_is_scored_where_it_trains() -> None:
    root = call("a", range(100, 110), range(200, 204))
    calls = [root, follow("b", root, [1], [2, 3]), follow("c", root, [4], [5, 6])]
    report = await verified(calls, scorer=recorded(calls))
    assert sorted(c.call_id for c in report.calls) == ["a", "b", "c"]
    assert report.drift.num_tokens == report.trained == 8


async def test_what_the_scorer_does_not_reach_is_counted() -> None:
    class Short(Table):
        async def score(self, ids: np.ndarray) -> np.ndarray:
            scores = await super().score(ids)
            scores[-2:] = np.nan
            return scores

    calls = conversation(1)
    report = await verified(calls, scorer=Short(recorded(calls).logprobs, []), tolerance=0.0)
    assert report.unscored == {"over_window": 2}
    assert report.drift.num_tokens == 2 and report.sound


async def test_what_the_scorer_refuses_is_counted_and_speaks_against_it() -> None:
    class Refusing(Table):
        async def score(self, ids: np.ndarray) -> np.ndarray:
            raise Unscorable("no such id")

    calls = conversation(2)
    report = await verified(calls, scorer=Refusing({}, []))
    assert report.unscored == {"refused": 7} and not report.sound
    assert "no such id" in report.complaints[0]


async def test_a_scorer_that_fails_ends_it_all() -> None:
    class Broken(Table):
        async def score(self, ids: np.ndarray) -> np.ndarray:
            raise RuntimeError("gone")

    def many() -> list[ModelCall]:
        return [call(c, [i], [i + 50]) for i, c in enumerate("abcdefghij", 1)]

    with pytest.raises(RuntimeError, match="gone"):
        await verified(many(), scorer=Broken({}, []))
