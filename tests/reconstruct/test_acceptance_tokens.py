"""The acceptance cases of token-faithful reconstruction beyond Polar's, one test each."""

from __future__ import annotations

import random

from tests.reconstruct.calls import call, checked, cumulative, follow, paths, polar, trained_in

SYSTEM = [1, 2, 3]
END = 50  # the end of a turn


def test_bpe_re_split() -> None:
    a = call("a", SYSTEM, [10, 11, END])
    anew = call("b", [*SYSTEM, 90, END, 4], [12, END], fallback="template_not_prefix_stable")
    exact = follow("b", a, [4], [12, END], continuation="exact", parent_call_id="a")
    trajectories, report = checked([a, anew])
    assert paths(trajectories) == {"a": "a", "b": "b"} and report.trained == 5
    assert report.fallbacks == {"template_not_prefix_stable": 1} and report.num_continued == 0
    trajectories, report = checked([a, exact])
    assert paths(trajectories) == {"b": "ab"} and report.trained == 5
    assert report.fallbacks == {} and report.num_continued == 1
    assert polar([a, exact])[1].mismatched == 0, "a continued call leaves no rule anything to get wrong"


def test_two_sub_agents_with_equal_prefixes_interleaved() -> None:
    main = call("a", SYSTEM, [10])
    x1 = call("b", [7, 8], [20], role="subagent")
    y1 = call("c", [7, 8], [30], role="subagent")
    y2 = follow("d", y1, [9], [31], role="subagent")
    x2 = follow("e", x1, [9], [21], role="subagent")
    back = follow("f", main, [6], [11])
    trajectories, report = checked([main, x1, y1, y2, x2, back])
    assert paths(trajectories) == {"f": "af", "e": "be", "d": "cd"} and report.trained == 6


def test_compaction_in_the_middle() -> None:
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


def test_a_tool_list_that_changes() -> None:
    a = call("a", [1, 70, 3], [10])
    b = call("b", [1, 70, 71, 3, 10, 4], [11])
    c = follow("c", b, [5], [12])
    trajectories, _ = checked([a, b, c])
    assert paths(trajectories) == {"a": "a", "c": "bc"}


def test_a_retry_whose_first_answer_was_delivered_and_whose_second_was_not() -> None:
    a = call("a", SYSTEM, [10])
    b = call("b", SYSTEM, [11], delivered=False)
    trajectories, _ = checked([a, b])
    assert trained_in(trajectories) == {"a": ["a"]}


def test_a_weight_update_between_two_calls() -> None:
    a = call("a", SYSTEM, [10], policy_version="9")
    b = follow("b", a, [4], [11], policy_version="10")
    c = follow("c", a, [5], [12], policy_version="11")
    trajectories, _ = checked([a, b, c])
    spans = [(t.policy_version_min, t.policy_version_max) for t in trajectories]
    assert spans == [("9", "10"), ("11", "11")], "only the spans that train count"
    assert [s.policy_version for s in trajectories[0].spans] == ["9", "10"]


def test_a_weight_update_inside_a_call() -> None:
    a = call("a", SYSTEM, [10, 11], policy_version="9", policy_version_last="10")
    b = follow("b", a, [4], [12], policy_version="10")
    (one,), _ = checked([a, b])
    assert (one.policy_version_min, one.policy_version_max) == ("9", "10")
    assert [(s.policy_version, s.policy_version_last) for s in one.spans] == [("9", "10"), ("10", None)]
    (alone,), _ = checked([a])
    assert (alone.policy_version_min, alone.policy_version_max) == ("9", "10")


def test_resume_of_a_session() -> None:
    a = call("a", SYSTEM, [10], started_at=1.0)
    b = follow("b", a, [4], [11], started_at=100_000.0)
    (one,), _ = checked([a, b])
    assert one.num_trained == 2


def test_500_calls_in_one_rollout() -> None:
    rng = random.Random(5)
    calls = [call("a", [rng.randrange(9) for _ in range(200)], [1, 2, 3], started_at=0.0)]
    for i in range(1, 500):
        added = [rng.randrange(9) for _ in range(20)]
        calls.append(follow(f"c{i:03}", calls[-1], added, [i, i + 1], started_at=float(i)))
    shuffled = rng.sample(calls, len(calls))
    (one,), report = checked(shuffled)
    assert one.token_ids.tolist() == cumulative(calls[-1])
    assert len(one.spans) == 500 and report.trained == 3 + 499 * 2
