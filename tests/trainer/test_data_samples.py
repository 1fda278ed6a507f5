"""Samples of a step: advantages per rollout before fan-out, masks with reasons, and no token lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.types import Message
from polar_mitm_trainer.config import AdvantageConfig
from polar_mitm_trainer.data import Account, Finished, NothingToLearn, samples_of
from polar_mitm_trainer.samples import Sample
from polar_mitm_trainer.shaping import overlong_penalty
from polar_mitm_trainer.tool_calls import is_malformed
from tests.trainer.stores import Recorded, answer, config, groups, rollout

PLAIN = config(advantage={"std": False})
CUT_OFF = {"finish_reason": "length"}


def finished(*recorded: Recorded) -> list[Finished]:
    return [each.finished for each in recorded]


def advantage_of(samples: list[Sample], rollout_id: str) -> float:
    """The one advantage that all trained tokens of a rollout have."""
    mine = [s for s in samples if s.rollout_id == rollout_id]
    (value,) = {float(a) for s in mine for a in s.advantages[s.loss_mask == 1]}
    assert all((s.advantages[s.loss_mask == 0] == 0).all() for s in mine)
    return value


def test_advantages_are_per_rollout_however_many_trajectories_it_has() -> None:
    some = finished(
        rollout("a", "g", 1.0, num_threads=5), rollout("b", "g", 0.0), rollout("c", "g", 0.5, num_calls=1)
    )
    samples, account = samples_of(some, PLAIN)
    assert [s.rollout_id for s in samples] == ["a"] * 5 + ["b", "c"]
    assert [advantage_of(samples, r) for r in "abc"] == [0.5, -0.5, 0.0]
    assert account.trained == account.sampled == sum(s.num_trained for s in samples)
    assert account.rollouts == {"trained": 3} and account.groups == {"trained": 1}
    assert sum(float(s.weights.sum()) for s in samples) == pytest.approx(1.0)
    for sample, trajectory in zip(samples, [t for each in some for t in each.trajectories], strict=True):
        assert sample.trajectory_id == trajectory.trajectory_id
        assert np.array_equal(sample.token_ids, trajectory.token_ids)
        assert np.array_equal(sample.loss_mask, trajectory.loss_mask)
        assert np.array_equal(sample.behaviour_logprobs, trajectory.behaviour_logprobs)
        assert sample.policy_version == "step-3"


def test_per_rollout_weights_make_splitting_worth_nothing() -> None:
    some = finished(rollout("a", "g", 1.0, num_threads=9), rollout("b", "g", 0.0))
    samples, _ = samples_of(some, config(loss={"aggregation": "rollout"}))
    shares = {r: sum(float(s.weights.sum()) for s in samples if s.rollout_id == r) for r in "ab"}
    assert shares == pytest.approx({"a": 0.5, "b": 0.5})


def test_who_is_left_out_does_not_sink_its_group() -> None:
    some = finished(
        rollout("a", "g", 1.0),
        rollout("b", "g", 0.0),
        rollout("stopped", "g", 1.0, status="interrupted"),
        rollout("holes", "g", 1.0, incomplete="a call is missing"),
        rollout("unjudged", "g", None),
        rollout("nan", "g", float("nan")),
        rollout("late", "g", 0.5, status="timeout"),
        rollout("error", "g", 0.0, status="failed"),
        rollout("error as well", "g", 1.0, status="failed"),
    )
    samples, account = samples_of(some, PLAIN)
    judged = {"a": 0.5, "b": -0.5, "late": 0.0, "error": -0.5, "error as well": 0.5}
    assert {r: advantage_of(samples, r) for r in judged} == judged
    assert account.rollouts == {
        "trained": 5,
        "interrupted_rollout": 1,
        "incomplete_rollout": 1,
        "no_reward": 1,
        "bad_reward": 1,
    }
    assert account.adds_up and account.left_out["interrupted_rollout"] > 0


def test_groups_that_teach_nothing_are_dropped_and_counted() -> None:
    useful = [rollout("a", "g", 1.0), rollout("b", "g", 0.0)]
    useless = [
        *[rollout(f"same{n}", "same", 0.25) for n in range(3)],
        rollout("single", "one", 1.0),
        rollout("other", "one", 1.0, status="interrupted"),
        rollout("alone", None, 1.0),
        rollout("unjudged", "none", None),
    ]
    samples, account = samples_of(finished(*useful, *useless), PLAIN)
    assert {s.group_id for s in samples} == {"g"}
    assert account.groups == {"trained": 1, "zero_variance": 1, "group_of_one": 2, "nobody_rewarded": 1}
    assert account.rollouts["zero_variance"] == 3 and account.adds_up
    with pytest.raises(NothingToLearn, match=r"7 rollouts.* 3 zero_variance.*group_of_one") as caught:
        samples_of(finished(*useless), PLAIN)
    assert caught.value.account.adds_up and caught.value.account.trained == 0


@pytest.mark.parametrize("rollouts", [[], [rollout("a", "g", 1.0), rollout("b", "h", 0.0)]])
def test_nothing_to_learn(rollouts: list[Recorded]) -> None:
    with pytest.raises(NothingToLearn, match=f"nothing to learn from {len(rollouts)} rollouts"):
        samples_of(finished(*rollouts), PLAIN)


def test_a_rollout_or_a_token_twice_is_an_error() -> None:
    a, b = finished(rollout("a", "g", 1.0), rollout("b", "g", 0.0))
    with pytest.raises(ValueError, match="rollout a is there twice"):
        samples_of([a, b, a], PLAIN)
    twice = Finished(a.outcome, a.trajectories * 2)
    with pytest.raises(ValueError, match=r"rollout a: its trajectories train .* there twice"):
        samples_of([twice, b], PLAIN)


# --- cut off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "truncated"),
    [
        ({}, False),
        ({"status": "timeout"}, True),
        ({"last": CUT_OFF}, True),
        ({"last": {"status": "cancelled"}}, True),
        ({"first": CUT_OFF}, False),
        ({"last": CUT_OFF | {"role": "subagent"}}, False),
    ],
)
def test_which_rollouts_were_cut_off(fields: dict[str, Any], truncated: bool) -> None:
    assert rollout("a", "g", 1.0, **fields).finished.outcome.truncated is truncated


def test_overlong_rollouts_are_masked_but_their_reward_counts() -> None:
    some = finished(rollout("a", "g", 1.0, status="timeout"), rollout("b", "g", 0.0), rollout("c", "g", 0.5))
    samples, account = samples_of(some, config(advantage={"std": False}, loss={"overlong": "mask"}))
    assert {r: advantage_of(samples, r) for r in "bc"} == {"b": -0.5, "c": 0.0}
    assert {s.rollout_id for s in samples} == {"b", "c"}
    assert account.masked == {"overlong": some[0].outcome.built.trained} and account.adds_up
    assert account.rollouts == {"trained": 2, "all_masked": 1}
    kept, _ = samples_of(some, PLAIN)
    assert advantage_of(kept, "a") == 0.5


def test_overlong_shaping_is_dapo_s() -> None:
    # arXiv 2503.14476, eq. 13, as it is printed: L_max = 100, L_cache = 20
    expected = {0: 0.0, 80: 0.0, 81: (80 - 81) / 20, 99: (80 - 99) / 20, 100: -1.0, 101: -1.0, 500: -1.0}
    assert {n: overlong_penalty(n, 100, 20) for n in expected} == pytest.approx(expected)
    loss = {"overlong": "shape", "overlong_length": 8, "overlong_buffer": 4}
    some = finished(rollout("a", "g", 1.0, num_calls=1), rollout("b", "g", 1.0, num_calls=3))
    assert [each.outcome.built.trained for each in some] == [2, 7]
    samples, _ = samples_of(some, config(advantage={"std": False}, loss=loss))
    assert [advantage_of(samples, r) for r in "ab"] == [0.375, -0.375]
    with pytest.raises(ValueError, match="overlong_length and overlong_buffer"):
        samples_of(some, config(loss={"overlong": "shape"}))


# --- stale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "version_last", "reason"),
    [
        ("step-5", None, None),
        ("step-7", None, None),
        ("step-4", None, "stale"),
        ("step-4", "step-7", "stale"),
        ("step-5", "step-7", None),
        ("step-8", None, "other_version"),
        ("step-07", None, "other_version"),
        ("tiny@fp_1", None, "other_version"),
        (None, None, "other_version"),
    ],
)
def test_stale_calls_are_masked_by_themselves(
    version: str | None, version_last: str | None, reason: str | None
) -> None:
    versions = {"policy_version": version, "policy_version_last": version_last}
    fresh = {"policy_version": "step-7"}
    some = finished(
        rollout("a", "g", 1.0, first=versions, last=fresh),
        rollout("b", "g", 0.0, first=fresh, last=fresh),
    )
    bounded = config(advantage={"std": False}, loss={"max_staleness": 2})
    samples, account = samples_of(some, bounded, current_step=7)
    span = some[0].trajectories[0].spans[0]
    train = 0 if reason else 1
    assert set(samples[0].loss_mask[span.sampled_start : span.end]) == {train}
    assert set(samples[0].behaviour_logprobs[span.sampled_start : span.end] != 0) == {bool(train)}
    assert account.masked == ({reason: span.end - span.sampled_start} if reason else {})
    assert account.adds_up and advantage_of(samples, "a") == 0.5
    for unbounded in ({"current_step": None}, {"current_step": 100}):
        samples, account = samples_of(
            some, bounded if unbounded["current_step"] is None else PLAIN, **unbounded
        )
        assert not account.masked


# --- malformed tool calls -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "malformed"),
    [
        (answer("fine"), False),
        (answer("", '{"command": "ls"}'), False),
        (answer("", "{}", '{"command": "ls'), True),
        (answer("", "[1]"), True),
        (answer("", '"ls"'), True),
        (answer("", ""), True),
        (answer("", "{'command': 'ls'}"), True),
        (answer("", '{"n": NaN}'), True),
        (answer("", "[" * 100_000), True),
        (answer("", "*** Begin Patch", kind="custom"), False),
        (answer('<tool_call>\n{"name": "bash", "arguments": {'), True),
    ],
)
def test_what_is_malformed(message: Message, malformed: bool) -> None:
    assert is_malformed(message) is malformed


def test_a_malformed_tool_call_is_a_negative_on_its_own_tokens() -> None:
    bad = {"answer": answer("", "{oops")}
    some = finished(
        rollout("a", "g", 1.0, num_calls=3, first=bad, last=bad | CUT_OFF), rollout("b", "g", 0.0)
    )
    samples, account = samples_of(some, config(advantage={"std": False, "invalid_tool_call": -2.0}))
    first, second, last = some[0].trajectories[0].spans
    per_call = [set(samples[0].advantages[s.sampled_start : s.end].tolist()) for s in (first, second, last)]
    assert per_call == [{-2.0}, {0.5}, {0.5}], "what was cut off is not the model's fault"
    assert account.malformed == first.end - first.sampled_start
    plain, counted = samples_of(some, PLAIN)
    assert advantage_of(plain, "a") == 0.5 and counted.malformed == account.malformed


# --- the account ----------------------------------------------------------------------------------------

STATUSES = ["completed", "completed", "timeout", "failed", "interrupted"]
ROLES = ["main", "main", "subagent", "auxiliary", "compaction"]


@st.composite
def steps(draw: st.DrawFn) -> list[Recorded]:
    made = []
    for n in range(draw(st.integers(0, 7))):
        one = rollout(
            f"r{n}",
            draw(st.sampled_from(["g", "h", None])),
            draw(st.sampled_from([None, 0.0, 0.5, 1.0, float("nan")])),
            num_calls=draw(st.integers(1, 3)),
            num_threads=draw(st.integers(1, 3)),
            status=draw(st.sampled_from(STATUSES)),
            incomplete=draw(st.sampled_from([None, None, None, "holes"])),
        )
        for call in one.calls:
            call.role = draw(st.sampled_from(ROLES))
            call.policy_version = draw(st.sampled_from(["step-3", "step-1", None]))
            call.status = draw(st.sampled_from(["ok", "ok", "ok", "cancelled", "failed"]))
            call.answer = draw(st.sampled_from([None, answer("hi"), answer("", "{oops")]))
            if draw(st.booleans()) and draw(st.booleans()):
                call.behaviour_logprobs = []
        made.append(one)
    return made


@settings(max_examples=200, deadline=None)
@given(
    steps(),
    st.sampled_from(["keep", "mask"]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([None, -1.0]),
    st.booleans(),
)
def test_every_sampled_token_is_accounted_for(
    step: list[Recorded], overlong: str, max_staleness: int | None, judged: float | None, some_only: bool
) -> None:
    told = config(
        loss={"overlong": overlong, "max_staleness": max_staleness}, advantage={"invalid_tool_call": judged}
    )
    rollouts = finished(*step)
    if some_only:
        rollouts = [Finished(r.outcome, r.trajectories[1:], r.malformed) for r in rollouts]
    samples: list[Sample] = []
    try:
        samples, account = samples_of(rollouts, told, current_step=3)
    except NothingToLearn as nothing:
        account = nothing.account
    assert account.adds_up
    assert account.sampled == sum(len(c.completion_token_ids) for one in step for c in one.calls)
    assert account.trained == sum(s.num_trained for s in samples)
    assert account.rollouts.total() == len(step) and all(s.num_trained for s in samples)
    assert account.groups.total() == len({r.outcome.group_id for r in rollouts})
    total = sum((s.weights.sum(dtype=np.float64) for s in samples), np.float64(0))
    assert not samples or total == pytest.approx(1.0, rel=1e-5)
    for sample in samples:
        masked = sample.loss_mask == 0
        for array in (sample.behaviour_logprobs, sample.advantages, sample.weights):
            assert np.isfinite(array).all() and not array[masked].any()


def test_accounts_add_up_over_steps_and_are_figures() -> None:
    first = samples_of(finished(*groups(2)), PLAIN)[1]
    second = samples_of(finished(*groups(3)), PLAIN)[1]
    both = first + second + Account()
    assert both.adds_up and both.sampled == first.sampled + second.sampled
    assert both.rollouts == {"trained": 20} and both.groups == {"trained": 5}
    assert all(isinstance(value, float) for value in both.metrics().values())
    assert both.metrics()["tokens/trained"] == both.trained


@pytest.mark.parametrize(("threads", "expected"), [((1, 3), 1.0), ((3, 1), -1.0), ((2, 2), None)])
def test_whether_splitting_pays(threads: tuple[int, int], expected: float | None) -> None:
    step = [
        rollout(f"{group}{n}", group, float(n) + base, num_threads=threads[n])
        for group, base in (("g", 0.0), ("h", 10.0))  # a group's own level says nothing
        for n in range(2)
    ]
    account = samples_of(finished(*step), PLAIN)[1]
    assert account.splitting.correlation == (None if expected is None else pytest.approx(expected))
    assert account.metrics()["splitting/trajectories_per_rollout"] == sum(threads) / 2


def test_advantages_are_those_of_the_configuration() -> None:
    some = finished(rollout("a", "g", 1.0), rollout("b", "g", 0.0), rollout("c", "g", 0.0))
    told = AdvantageConfig(std=False, leave_one_out=True)
    samples, _ = samples_of(some, config(advantage=told.model_dump()))
    assert [advantage_of(samples, r) for r in "abc"] == [1.0, -0.5, -0.5]
