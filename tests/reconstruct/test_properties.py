"""Random conversations with random edits: the build equals the oracle's, in any order of arrival."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.reconstruct import Trajectory, build
from polar_mitm.types import ModelCall, Rollout
from tests.reconstruct.calls import call, checked, cumulative, polar, trained_in
from tests.reconstruct.oracle import expected, spliced
from tests.reconstruct.stored import shared_with, stored

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
                finish_reason=draw(st.sampled_from(["stop", "tool_calls", "length", None])),
                role=draw(st.sampled_from(["main"] * 4 + ["subagent"] * 2 + ["auxiliary", "compaction"])),
                parent_call_id=draw(st.none() | st.sampled_from(NAMES)),
                fallback=draw(st.sampled_from([None, "text_differs", "ambiguous"])),
            )
        )
    return calls


def same(ours: Iterable[Trajectory], theirs: Iterable[Trajectory]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.trajectory_id == other.trajectory_id and one.spans == other.spans
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.loss_mask, other.loss_mask)
        assert np.array_equal(one.behaviour_logprobs, other.behaviour_logprobs)


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


@settings(max_examples=500, deadline=None)
@given(conversations(), st.data())
def test_however_a_prompt_is_stored_the_ids_decide(calls: list[ModelCall], data: st.DataObject) -> None:
    order = data.draw(st.permutations(calls))  # of storage: each may lie on top of any before it
    bases = {}
    for i, one in enumerate(order):
        if i and data.draw(st.booleans()):
            base = data.draw(st.sampled_from(order[:i]))
            bases[one.call_id] = base.call_id, data.draw(st.integers(0, shared_with(one, base)))
    trajectories, report = checked(calls, columns=stored(calls, bases))
    plain, plain_report = build(calls, rollout=Rollout("r1"))
    assert report == plain_report
    same(trajectories, plain)


@settings(max_examples=300, deadline=None)
@given(conversations(), st.integers(1, 12))
def test_split_samples_hold_the_same_tokens(calls: list[ModelCall], max_tokens: int) -> None:
    whole, _ = checked(calls)
    samples, report = checked(calls, max_tokens=max_tokens)
    path_of = {span.call_id: path for path in whole for span in path.spans}
    overlong = {}
    for sample in samples:
        size = sample.token_ids.size
        assert sample.token_ids.tolist() == path_of[sample.trajectory_id].token_ids[:size].tolist()
        assert size - sample.num_context <= max_tokens
        overlong |= {s.call_id: s.end - s.sampled_start for s in sample.spans if s.mask_reason == "overlong"}
    assert report.masked.get("overlong", 0) == sum(overlong.values())
    assert trained_in(samples).keys() | overlong.keys() == trained_in(whole).keys()
    lengths = {s.call_id: s.end - s.start for path in whole for s in path.spans if s.mask_reason is None}
    assert overlong.keys() == {call_id for call_id, length in lengths.items() if length > max_tokens}


@settings(max_examples=300, deadline=None)
@given(conversations())
def test_polar_splice_equals_the_slow_oracle(calls: list[ModelCall]) -> None:
    trajectories, report = polar(calls, include_auxiliary=True, include_compaction=True)
    streams, mismatched, num_dropped = spliced(calls)
    assert [t.token_ids.tolist() for t in trajectories] == streams
    assert report.mismatched == mismatched and report.masked == (
        {"dropped": num_dropped} if num_dropped else {}
    )


@settings(max_examples=200, deadline=None)
@given(conversations())
def test_per_request_is_one_trajectory_for_each_call(calls: list[ModelCall]) -> None:
    trajectories, report = checked(calls, builder="per-request")
    assert sorted(t.trajectory_id for t in trajectories) == sorted(c.call_id for c in calls)
    assert all(len(t.spans) == 1 for t in trajectories)
    forest = build(calls)[1]
    assert (report.trained, report.masked) == (forest.trained, forest.masked)


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
    same(ours, theirs)
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
