"""What a build gives, case by case."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from polar_mitm.reconstruct import build
from polar_mitm.types import Rollout
from tests.reconstruct.calls import call, checked, follow, paths, reasons, trained_in

SYSTEM = [1, 2, 3]


def test_a_conversation_is_one_trajectory() -> None:
    a = call("a", SYSTEM, [10, 11])
    b = follow("b", a, [4, 5], [12])
    c = follow("c", b, [6], [13, 14])
    (one,), report = checked([a, b, c])
    assert one.token_ids.tolist() == [1, 2, 3, 10, 11, 4, 5, 12, 6, 13, 14]
    assert one.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1]
    assert one.behaviour_logprobs.tolist() == [0, 0, 0, -0.125, -0.25, 0, 0, -0.125, 0, -0.125, -0.25]
    assert [(s.call_id, s.start, s.sampled_start, s.end) for s in one.spans] == [
        ("a", 0, 3, 5),
        ("b", 5, 7, 8),
        ("c", 8, 9, 11),
    ]
    assert (report.sampled, report.trained, report.num_masked, report.num_quarantined) == (5, 5, 0, 0)


def test_extension_outweighs_delivery() -> None:
    a = call("a", SYSTEM, [10], delivered=False)
    b = call("b", SYSTEM, [11], delivered=True)
    c = follow("c", a, [4], [12])
    trajectories, _ = checked([a, b, c])
    assert paths(trajectories) == {"c": "ac", "b": "b"} and reasons(trajectories) == {("b", "b"): "orphan"}


def test_a_delivered_sibling_that_a_call_names_as_parent_is_alive() -> None:
    """Parallel threads, both of which went on: one by its ids, the other rendered anew."""
    a, b = call("a", SYSTEM, [10]), call("b", SYSTEM, [11])
    by_ids = follow("c", a, [4], [12], parent_call_id="a")
    anew = call("d", [*SYSTEM, 91, 4], [13], parent_call_id="b", fallback="text_differs")
    trajectories, report = checked([a, b, by_ids, anew])
    assert paths(trajectories) == {"b": "b", "c": "ac", "d": "d"}
    assert report.trained == 4 and report.masked == {}
    _, alone = checked([a, b, anew])
    assert alone.masked == {"orphan": 1}, "of two delivered ones, the one whose thread went on"


def test_a_sibling_that_was_not_delivered_or_only_named_at_a_guess_is_an_orphan() -> None:
    a, b = call("a", SYSTEM, [10]), call("b", SYSTEM, [11])
    by_ids = follow("c", a, [4], [12], parent_call_id="a")
    anew = call("d", [*SYSTEM, 91, 4], [13], parent_call_id="b", fallback="text_differs")
    for named in ([replace(b, delivered=False), anew], [b, replace(anew, fallback="ambiguous")]):
        assert checked([a, by_ids, *named])[1].masked == {"orphan": 1}
    assert checked([a, b, replace(anew, status="failed"), by_ids])[1].masked == {"orphan": 1}, "not admitted"


def test_retries_of_which_none_arrived_leave_the_last_one_alive() -> None:
    calls = [call(name, SYSTEM, [ord(name)], delivered=False, status="cancelled") for name in "abc"]
    trajectories, report = checked(calls)
    assert trained_in(trajectories) == {"c": ["c"]} and report.masked == {"orphan": 2}


def test_greedy_retry_with_an_equal_answer_trains_once() -> None:
    a = call("a", SYSTEM, [10, 11], delivered=False)
    b = call("b", SYSTEM, [10, 11])
    c = follow("c", b, [4], [12])
    trajectories, report = checked([a, b, c])
    assert paths(trajectories) == {"c": "bc", "a": "a"}
    assert report.trained == 3 and report.masked == {"orphan": 2}
    named, _ = checked([a, b, follow("c", a, [4], [12], parent_call_id="a")])
    assert paths(named) == {"c": "ac", "b": "b"}, "recorded lineage chooses between equal ids"


def test_a_branch_trains_its_stem_once() -> None:
    a = call("a", SYSTEM, [10, 11])
    b = follow("b", a, [4], [12])
    c = follow("c", a, [5], [13])
    trajectories, report = checked([a, b, c])
    assert paths(trajectories) == {"b": "ab", "c": "ac"}
    assert trained_in(trajectories) == {"a": ["b"], "b": ["b"], "c": ["c"]}
    assert reasons(trajectories) == {("c", "a"): "shared_prefix"}
    assert report.masked == {}, "a shared token is trained, so it is not accounted as masked"


def test_a_stem_never_trains_on_an_orphans_path() -> None:
    a = call("a", SYSTEM, [10])
    orphan = follow("b", a, [4], [11], delivered=False)
    c = follow("c", a, [4], [12])
    trajectories, _ = checked([a, orphan, c])
    assert trained_in(trajectories) == {"a": ["c"], "c": ["c"]}
    assert {t.trajectory_id: t.num_trained for t in trajectories} == {"c": 2, "b": 0}


def test_a_cancelled_call_keeps_its_partial_tokens_marked_truncated() -> None:
    a = call("a", SYSTEM, [10])
    b = follow("b", a, [4], [11, 12], status="cancelled", delivered=False, finish_reason=None)
    (one,), report = checked([a, b])
    assert [s.truncated for s in one.spans] == [False, True] and report.trained == 3


def test_a_failed_call_is_left_out_and_its_successor_continues_the_call_before_it() -> None:
    a = call("a", SYSTEM, [10])
    broken = follow("b", a, [4], [11], status="failed", error="engine broke", finish_reason=None)
    c = follow("c", broken, [5], [12])
    (one,), report = checked([a, broken, c])
    assert one.token_ids.tolist() == [*SYSTEM, 10, 4, 11, 5, 12]
    assert one.loss_mask.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert report.quarantined == {"failed": 1}


def test_an_incomplete_rollout_is_quarantined_whole() -> None:
    a = call("a", SYSTEM, [10])
    trajectories, report = checked([a], rollout=Rollout("r1", incomplete="a write failed"))
    assert len(trajectories) == 0 and report.quarantined == {"incomplete_rollout": 1}
    assert report.quarantined_calls == (("a", "incomplete_rollout"),)


def test_the_group_travels_with_the_trajectory() -> None:
    (one,), _ = checked([call("a", SYSTEM, [10])], rollout=Rollout("r1", group_id="g7"))
    assert (one.rollout_id, one.group_id, one.role) == ("r1", "g7", "main")


def test_order_of_arrival_does_not_matter() -> None:
    a = call("a", SYSTEM, [10])
    b = call("b", SYSTEM, [10], delivered=False)
    c = follow("c", a, [4], [11], started_at=98.0)
    d = follow("d", a, [4], [12], started_at=98.0, delivered=False)
    broken = [call(name, SYSTEM, [7], status="failed") for name in "ef"]
    expected = build([a, b, c, d, *broken])
    for order in itertools.permutations([a, b, c, d, *broken]):
        trajectories, report = build(order)
        assert report == expected[1]
        for ours, theirs in zip(trajectories, expected[0], strict=True):
            assert ours.spans == theirs.spans
            assert np.array_equal(ours.token_ids, theirs.token_ids)
            assert np.array_equal(ours.loss_mask, theirs.loss_mask)


def test_calls_of_two_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match="r1, r2"):
        build([call("a", SYSTEM, [1]), call("b", SYSTEM, [2], rollout_id="r2")])
    with pytest.raises(ValueError, match="r1, r3"):
        build([call("a", SYSTEM, [1])], rollout=Rollout("r3"))


def test_no_calls_no_trajectories() -> None:
    trajectories, report = checked([])
    assert len(trajectories) == 0 and report.sampled == 0


@pytest.mark.parametrize(
    "options",
    [{"builder": "forrest"}, {"max_tokens": 0}, {"max_tokens": 9, "builder": "polar-splice"}],
)
def test_what_a_builder_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        build([call("a", SYSTEM, [1])], **options)


def test_trajectories_are_a_sequence_and_assembled_anew_each_time() -> None:
    trajectories, _ = build([call("a", SYSTEM, [1]), call("b", [9], [2]), call("c", [8], [3])])
    assert len(trajectories) == 3 and [t.trajectory_id for t in trajectories[1:]] == ["b", "c"]
    assert trajectories[-1].token_ids.tolist() == [8, 3]
    trajectories[0].loss_mask[:] = 0
    assert trajectories[0].num_trained == 1
    with pytest.raises(IndexError):
        trajectories[3]


def test_a_call_that_is_too_long_alone_is_masked_and_what_follows_still_trains() -> None:
    a = call("a", SYSTEM, [10])
    long = follow("b", a, [4, 5, 6], [11, 12])
    c = follow("c", long, [7], [13])
    trajectories, report = checked([a, long, c], max_tokens=4)
    assert paths(trajectories) == {"a": "a", "b": "ab", "c": "abc"}
    assert report.masked == {"overlong": 2} and report.trained == 2
    assert reasons(trajectories)["c", "b"] == "overlong" and trajectories[2].num_context == 9
    assert checked([a, long, c], max_tokens=4, builder="per-request")[1].masked == {"overlong": 3}


# --- several answers to one request; grammars ----------------------------------------------------------


def test_several_answers_to_one_request_are_alive_until_one_goes_on() -> None:
    first = call("a", SYSTEM, [10, 11])
    others = [replace(first, call_id=f"a{n}", completion_token_ids=[20 + n, 9]) for n in (1, 2)]
    for each in others:
        each.notes = ["answer_of:a"]
    trajectories, report = checked([first, *others])
    assert report.trained == 6 and len(trajectories) == 3
    then = follow("c", others[1], [4], [12], parent_call_id="a2")
    trajectories, report = checked([first, *others, then])
    assert trained_in(trajectories) == {"a2": ["c"], "c": ["c"]} and report.masked == {"orphan": 4}
    assert checked([first, *others, then], include_orphans=True)[1].trained == 7


def test_what_a_grammar_shaped_trains_only_where_asked_for() -> None:
    a = call("a", SYSTEM, [10, 11])
    b = follow("b", a, [4], [12, 13], notes=["withheld:web_search", "guided:json_schema"])
    c = follow("c", b, [5], [14], notes=["unguided:json_schema"])
    trajectories, report = checked([a, b, c])
    assert reasons(trajectories) == {("c", "b"): "guided"} and report.masked == {"guided": 2}
    (one,) = trajectories
    assert one.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 1]
    assert checked([a, b, c], include_guided=True)[1].trained == 5
    for builder in ("per-request", "polar-splice"):
        assert build([a, b, c], builder=builder)[1].masked["guided"] == 2  # type: ignore[arg-type]
    auxiliary = replace(b, role="auxiliary")
    assert checked([a, auxiliary], include_auxiliary=True)[1].masked == {"guided": 2}
