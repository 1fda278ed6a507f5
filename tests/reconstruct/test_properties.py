"""Random conversations with random edits: the build equals the oracle's, in any order of arrival."""

from __future__ import annotations

import copy
import random
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.reconstruct import build
from polar_mitm.types import ModelCall
from tests.reconstruct.calls import call, checked, cumulative, trained_in
from tests.reconstruct.oracle import expected

NAMES = "abcdefghijkl"
# Few distinct ids, so that equal prefixes also come about by chance.
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> list[ModelCall]:
    """Calls that extend, retry, branch off, edit the history of, or ignore the calls before them."""
    calls: list[ModelCall] = []
    for name in NAMES[: draw(st.integers(0, len(NAMES)))]:
        prompt = draw(tokens)
        earlier = draw(st.sampled_from(calls)) if calls else None
        sampled = draw(tokens)
        if earlier:
            match draw(st.sampled_from(["extend", "extend", "extend", "retry", "repeat", "edit", "restart"])):
                case "extend":
                    prompt = cumulative(earlier) + prompt
                case "retry":
                    prompt = earlier.prompt_token_ids
                case "repeat":
                    prompt, sampled = earlier.prompt_token_ids, earlier.completion_token_ids
                case "edit":
                    ids = cumulative(earlier)
                    place = draw(st.integers(0, len(ids) - 1))
                    prompt = (
                        ids[:place]
                        + draw(st.lists(st.integers(0, 2), max_size=1))
                        + ids[place + 1 :]
                        + prompt
                    )
        calls.append(
            call(
                name,
                prompt,
                sampled,
                started_at=float(draw(st.integers(0, 3))),
                delivered=draw(st.booleans()),
                status=draw(st.sampled_from(["ok", "ok", "cancelled"])),
                role=draw(st.sampled_from(["main"] * 4 + ["subagent"] * 2 + ["auxiliary", "compaction"])),
                parent_call_id=draw(st.none() | st.sampled_from(NAMES)),
            )
        )
    return calls


@settings(max_examples=500, deadline=None)
@given(conversations(), st.booleans())
def test_build_equals_the_slow_oracle(calls: list[ModelCall], include_orphans: bool) -> None:
    trajectories, report = checked(calls, include_orphans=include_orphans)
    paths, trained, masked = expected(calls, include_orphans=include_orphans)
    assert [[s.call_id for s in t.spans] for t in trajectories] == paths
    assert trained_in(trajectories) == {call_id: [leaf] for call_id, leaf in trained.items()}
    by_reason: Counter[str] = Counter()
    for one in calls:
        if one.call_id in masked:
            by_reason[masked[one.call_id]] += len(one.completion_token_ids)
    assert report.masked == by_reason


@settings(max_examples=200, deadline=None)
@given(conversations(), st.randoms(use_true_random=False))
def test_arrival_order_does_not_matter_and_the_input_is_left_alone(
    calls: list[ModelCall], rng: random.Random
) -> None:
    shuffled = copy.deepcopy(calls)
    rng.shuffle(shuffled)
    ours, our_report = build(calls)
    theirs, their_report = build(shuffled)
    assert our_report == their_report
    for one, other in zip(ours, theirs, strict=True):
        assert one.trajectory_id == other.trajectory_id and one.spans == other.spans
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.loss_mask, other.loss_mask)
        assert np.array_equal(one.behaviour_logprobs, other.behaviour_logprobs)
    before = copy.deepcopy(shuffled)
    build(shuffled)
    assert shuffled == before


@settings(max_examples=200, deadline=None)
@given(conversations(), st.data())
def test_broken_calls_change_the_account_not_the_rules(calls: list[ModelCall], data: st.DataObject) -> None:
    for one in calls:
        match data.draw(
            st.sampled_from(["fine", "fine", "fine", "failed", "ids", "logprobs", "nan", "twin"])
        ):
            case "failed":
                one.status = "failed"
            case "ids":
                one.completion_token_ids = []
            case "logprobs":
                one.behaviour_logprobs = one.behaviour_logprobs[1:]
            case "nan":
                one.behaviour_logprobs = [float("nan")] * len(one.completion_token_ids)
            case "twin":
                one.call_id = calls[0].call_id
    _, report = build(calls)
    assert report.adds_up
    checked([one for one in calls if one.call_id != calls[0].call_id])
