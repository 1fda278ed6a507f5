"""One named test per case on which a prefix-merging reconstruction can go wrong."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from polar_mitm.reconstruct import build
from polar_mitm.types import Rollout
from tests.reconstruct.calls import call, checked, cumulative, follow, paths, reasons, trained_in

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


def test_retry_of_the_first_call_with_an_identical_prompt_keeps_the_chain() -> None:
    lost = call("a", SYSTEM, [10, 11], delivered=False)
    b = call("b", SYSTEM, [12])
    c = follow("c", b, [4], [13])
    d = follow("d", c, [4], [14])
    trajectories, report = checked([lost, b, c, d])
    assert paths(trajectories) == {"d": "bcd", "a": "a"}
    assert reasons(trajectories) == {("a", "a"): "orphan"}
    assert report.masked == {"orphan": 2} and report.trained == 3
    _, generous = checked([lost, b, c, d], include_orphans=True)
    assert generous.trained == 5 and generous.masked == {}


def test_retry_whose_first_answer_was_delivered_and_whose_second_was_not() -> None:
    a = call("a", SYSTEM, [10])
    b = call("b", SYSTEM, [11], delivered=False)
    trajectories, _ = checked([a, b])
    assert trained_in(trajectories) == {"a": ["a"]}


def test_extension_outweighs_delivery() -> None:
    a = call("a", SYSTEM, [10], delivered=False)
    b = call("b", SYSTEM, [11], delivered=True)
    c = follow("c", a, [4], [12])
    trajectories, _ = checked([a, b, c])
    assert paths(trajectories) == {"c": "ac", "b": "b"} and reasons(trajectories) == {("b", "b"): "orphan"}


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


def test_n_parallel_siblings_all_delivered_all_train() -> None:
    trajectories, report = checked([call(name, SYSTEM, [ord(name)]) for name in "abcd"])
    assert len(trajectories) == 4 and report.trained == 4


def test_a_break_in_the_chain_starts_a_trajectory_and_drops_nothing() -> None:
    a = call("a", SYSTEM, [10])
    b = call("b", [9, 9], [11])
    c = follow("c", b, [4], [12])
    trajectories, report = checked([a, b, c])
    assert paths(trajectories) == {"a": "a", "c": "bc"} and report.trained == 3


@pytest.mark.parametrize("edit", ["bpe re-split", "arguments re-serialised", "reasoning stripped"])
def test_tokens_train_under_the_context_they_were_sampled_under(edit: str) -> None:
    a = call("a", SYSTEM, [10, 11, 12])
    seen = {
        "bpe re-split": [10, 90, 91, 12],
        "arguments re-serialised": [10, 12, 11],
        "reasoning stripped": [12],
    }[edit]
    b = call("b", [*SYSTEM, *seen, 4], [13])
    trajectories, _ = checked([a, b])
    assert paths(trajectories) == {"a": "a", "b": "b"}
    assert trajectories[1].token_ids.tolist() == [*SYSTEM, *seen, 4, 13]
    assert trajectories[1].loss_mask.sum() == 1, "echoed history was not sampled under this context"


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


def test_two_sub_agents_with_equal_prefixes_interleaved() -> None:
    main = call("a", SYSTEM, [10])
    x1 = call("b", [7, 8], [20], role="subagent")
    y1 = call("c", [7, 8], [30], role="subagent")
    y2 = follow("d", y1, [9], [31], role="subagent")
    x2 = follow("e", x1, [9], [21], role="subagent")
    back = follow("f", main, [6], [11])
    trajectories, report = checked([main, x1, y1, y2, x2, back])
    assert paths(trajectories) == {"f": "af", "e": "be", "d": "cd"} and report.trained == 6


def test_compaction_is_its_own_root_and_masked_unless_asked_for() -> None:
    a = call("a", SYSTEM, [10])
    b = follow("b", a, [4], [11])
    summary = follow("c", b, [5], [40, 41], role="compaction")
    d = call("d", [*SYSTEM, 40, 41, 6], [12])
    trajectories, report = checked([a, b, summary, d])
    assert paths(trajectories) == {"b": "ab", "c": "c", "d": "d"}
    assert report.masked == {"compaction": 2} and report.trained == 3
    assert trajectories[1].loss_mask.sum() == 0
    trajectories, report = checked([a, b, summary, d], include_compaction=True)
    assert trained_in(trajectories)["c"] == ["c"] and report.trained == 5


def test_auxiliary_calls_do_not_take_the_tasks_reward() -> None:
    title = call("a", SYSTEM, [10], role="auxiliary")
    main = follow("b", title, [4], [11])
    trajectories, report = checked([title, main])
    assert paths(trajectories) == {"a": "a", "b": "b"}, "never a parent, whatever its ids"
    assert report.masked == {"auxiliary": 1} and report.trained == 1
    assert checked([title, main], include_auxiliary=True)[1].trained == 2


def test_a_changed_tool_list_starts_a_new_trajectory() -> None:
    a = call("a", [1, 70, 3], [10])
    b = call("b", [1, 70, 71, 3, 10, 4], [11])
    c = follow("c", b, [5], [12])
    trajectories, _ = checked([a, b, c])
    assert paths(trajectories) == {"a": "a", "c": "bc"}


def test_a_cancelled_call_keeps_its_partial_tokens_marked_truncated() -> None:
    a = call("a", SYSTEM, [10])
    b = follow("b", a, [4], [11, 12], status="cancelled", delivered=False, finish_reason=None)
    (one,), report = checked([a, b])
    assert [s.truncated for s in one.spans] == [False, True] and report.trained == 3


def test_a_turn_cut_by_length_continues_and_is_marked_truncated() -> None:
    a = call("a", SYSTEM, [10, 11], finish_reason="length")
    b = follow("b", a, [99, 4], [12])
    (one,), _ = checked([a, b])
    assert [s.truncated for s in one.spans] == [True, False]


def test_a_weight_update_between_two_calls_is_visible() -> None:
    a = call("a", SYSTEM, [10], policy_version="9")
    b = follow("b", a, [4], [11], policy_version="10")
    c = follow("c", a, [5], [12], policy_version="11")
    trajectories, _ = checked([a, b, c])
    spans = [(t.policy_version_min, t.policy_version_max) for t in trajectories]
    assert spans == [("9", "10"), ("11", "11")], "only the spans that train count"
    assert [s.policy_version for s in trajectories[0].spans] == ["9", "10"]


def test_a_resumed_session_goes_on_in_the_same_trajectory() -> None:
    a = call("a", SYSTEM, [10], started_at=1.0)
    b = follow("b", a, [4], [11], started_at=100_000.0)
    (one,), _ = checked([a, b])
    assert one.num_trained == 2


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


def test_500_calls_in_one_rollout_are_one_trajectory_with_nothing_clipped() -> None:
    rng = random.Random(5)
    calls = [call("a", [rng.randrange(9) for _ in range(200)], [1, 2, 3], started_at=0.0)]
    for i in range(1, 500):
        added = [rng.randrange(9) for _ in range(20)]
        calls.append(follow(f"c{i:03}", calls[-1], added, [i, i + 1], started_at=float(i)))
    shuffled = rng.sample(calls, len(calls))
    (one,), report = checked(shuffled)
    assert one.token_ids.tolist() == cumulative(calls[-1])
    assert len(one.spans) == 500 and report.trained == 3 + 499 * 2


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
