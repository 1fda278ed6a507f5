"""Where Polar falls short, item by item: what a build makes of such calls, and what Polar's rule does.

Items that reconstruction does not decide, or not alone, are shown elsewhere:

| item | test |
|---|---|
| 7 | tests/addons/test_streaming.py::test_each_chunk_can_be_read_before_the_next_is_sent |
| 7 | tests/addons/test_hang_up.py::test_in_the_middle_of_a_stream |
| 8 | tests/e2e/test_endings.py::test_timeout |
| 9 | tests/addons/test_refusals.py::test_side_endpoints_are_answered_here |
| 10 | tests/addons/test_refusals.py::test_a_websocket_is_told_to_use_http |
| 10 | tests/addons/test_bad_requests.py::test_compressed_requests |
| 14 | tests/test_exchange.py::test_the_rollouts_sampling_wins_and_both_are_recorded |
| 15 | tests/upstream/test_probe.py::test_an_unfit_engine_is_refused |
| 16 | tests/sandbox/test_network.py::test_services_of_the_host_are_out_of_reach |
| 17 | tests/addons/test_many.py::test_what_is_on_its_way_when_the_rollout_ends_comes_too_late |
| 19 | tests/store/test_roundtrip.py::test_every_field_of_a_call |
| 20 | tests/store/test_redact.py::test_no_secret_of_an_exchange_is_in_the_file |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.types import Rollout, Usage
from tests.reconstruct.calls import call, checked, follow, paths, polar, reasons, trained_in

SYSTEM = [1, 2, 3]
END = 50  # the end of a turn


def test_01_a_retry_with_an_identical_prompt_keeps_the_chain() -> None:
    lost = call("a", SYSTEM, [10, END], delivered=False)
    b = call("b", SYSTEM, [12, END])
    c = follow("c", b, [4], [13, END])
    d = follow("d", c, [4], [14, END])
    trajectories, report = checked([lost, b, c, d])
    assert paths(trajectories) == {"d": "bcd", "a": "a"}
    assert reasons(trajectories) == {("a", "a"): "orphan"}
    assert report.masked == {"orphan": 2} and report.trained == 6
    _, generous = checked([lost, b, c, d], include_orphans=True)
    assert generous.trained == 8 and generous.masked == {}
    kept, theirs = polar([lost, b, c, d])
    assert paths(kept) == {"a": "a"} and theirs.masked == {"dropped": 6}, "one call of four, the orphan"


def test_02_n_parallel_siblings_all_delivered_all_train() -> None:
    siblings = [call(name, SYSTEM, [ord(name), END]) for name in "abcd"]
    trajectories, report = checked(siblings)
    assert len(trajectories) == 4 and report.trained == 8
    kept, theirs = polar(siblings)
    assert paths(kept) == {"a": "a"} and theirs.masked == {"dropped": 6}, "all but the first"


def test_03_a_break_in_the_chain_starts_a_trajectory_and_drops_nothing() -> None:
    a = call("a", SYSTEM, [10, END])
    b = call("b", [*SYSTEM, 10, 4], [11, END])  # a template that shows no end of turn in history
    c = follow("c", b, [4], [12, END])
    trajectories, report = checked([a, b, c])
    assert paths(trajectories) == {"a": "a", "c": "bc"} and report.trained == 6
    kept, theirs = polar([a, b, c])
    assert paths(kept) == {"a": "a"} and theirs.masked == {"dropped": 4}, "the rest of the chain"


def test_04_no_token_trains_under_another_context_than_it_was_sampled_under() -> None:
    a = call("a", SYSTEM, [10, 11, END])
    b = call("b", [*SYSTEM, 90, END, 4], [12, END])  # the same text, tokenised anew
    trajectories, report = checked([a, b])
    assert [t.token_ids.tolist() for t in trajectories] == [
        [*SYSTEM, 10, 11, END],
        [*SYSTEM, 90, END, 4, 12, END],
    ]
    assert report.trained == 5 and report.mismatched == 0
    (merged,), theirs = polar([a, b])
    assert merged.token_ids.tolist() == [*SYSTEM, 10, 11, END, 4, 12, END]
    assert theirs.trained == 5 and theirs.mismatched == 2, "b was sampled after 90, and trains after 10, 11"


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param([10, 90, 91, 12, END], id="BPE re-split"),
        pytest.param([10, 12, 11, END], id="arguments re-serialised"),
        pytest.param([12, END], id="reasoning stripped"),
    ],
)
def test_05_edited_history_is_neither_trained_nor_silently_replaced(seen: list[int]) -> None:
    a = call("a", SYSTEM, [10, 11, 12, END])
    b = call("b", [*SYSTEM, *seen, 4], [13, END])
    trajectories, _ = checked([a, b])
    assert paths(trajectories) == {"a": "a", "b": "b"}
    assert trajectories[1].token_ids.tolist() == [*SYSTEM, *seen, 4, 13, END]
    assert trajectories[1].num_trained == 2, "echoed history was not sampled under this context"
    assert polar([a, b])[1].mismatched == 2


@pytest.mark.parametrize(
    ("sampled", "fields", "between", "truncated"),
    [
        pytest.param([10, END], {}, [4], False, id="ChatML"),
        pytest.param([10, 60], {"finish_reason": "tool_calls"}, [61, 4], False, id="Harmony: another end"),
        pytest.param([10, 70], {}, [4], False, id="GLM: the next role ends the turn"),
        pytest.param([10, 11], {}, [12, END, 4], False, id="a stop string, which is not sampled"),
        pytest.param([10, 11], {"finish_reason": "length"}, [END, 4], True, id="cut by length"),
        pytest.param([10], {"status": "cancelled", "finish_reason": None}, [END, 4], True, id="cancelled"),
    ],
)
def test_06_turns_end_as_their_template_has_it(
    sampled: list[int], fields: dict[str, Any], between: list[int], truncated: bool
) -> None:
    a = call("a", SYSTEM, sampled, **fields)
    b = follow("b", a, between, [13, END])
    (one,), report = checked([a, b])
    assert one.token_ids.tolist() == [*SYSTEM, *sampled, *between, 13, END]
    assert report.trained == len(sampled) + 2
    assert [s.truncated for s in one.spans] == [truncated, False]


def test_08_a_rollout_that_ran_out_of_time_keeps_what_it_has() -> None:
    a = call("a", SYSTEM, [10, END])
    cut = follow("b", a, [4], [11], status="cancelled", delivered=False, finish_reason=None)
    timeout = Rollout("r1", status="timeout", stop_reason="the deadline")
    (one,), report = checked([a, cut], rollout=timeout)
    assert report.trained == 3 and [s.truncated for s in one.spans] == [False, True]


def test_11_auxiliary_calls_do_not_take_the_tasks_reward() -> None:
    title = call("a", SYSTEM, [10], role="auxiliary")
    main = follow("b", title, [4], [11])
    trajectories, report = checked([title, main])
    assert paths(trajectories) == {"a": "a", "b": "b"}, "never a parent, whatever its ids"
    assert report.masked == {"auxiliary": 1} and report.trained == 1
    assert checked([title, main], include_auxiliary=True)[1].trained == 2


def test_12_a_harness_that_fails_leaves_its_tokens_trainable() -> None:
    failed = Rollout("r1", status="failed", exit_code=1)
    assert checked([call("a", SYSTEM, [10])], rollout=failed)[1].trained == 1


def test_13_policy_versions_are_the_engines_own_and_may_span_an_update() -> None:
    a = call("a", SYSTEM, [10, END], policy_version="tiny@9")
    b = follow("b", a, [4], [11, END], policy_version="tiny@10")
    (one,), _ = checked([a, b])
    assert (one.policy_version_min, one.policy_version_max) == ("tiny@9", "tiny@10")


def test_15_calls_without_ids_are_counted_and_named() -> None:
    lost = call("a", SYSTEM, [], usage=Usage(completion_tokens=9))
    good = call("b", SYSTEM, [10])
    trajectories, report = checked([lost, good])
    assert report.quarantined == {"no_token_ids": 9} and report.quarantined_calls == (("a", "no_token_ids"),)
    assert trained_in(trajectories) == {"b": ["b"]} and report.sampled == 10


def test_18_nothing_is_clipped_at_a_token_budget() -> None:
    a = call("a", SYSTEM, [10, END])
    b = follow("b", a, [4], [11, END])
    c = follow("c", b, [4], [12, END])
    trajectories, report = checked([a, b, c], max_tokens=8)
    assert paths(trajectories) == {"b": "ab", "c": "abc"} and report.trained == 6
    assert trajectories[1].num_context == 8 and trajectories[1].num_trained == 2


def test_the_table_names_tests_that_there_are() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"(tests/\S+\.py)::(test_\w+)", __doc__ or "")
    assert named and [n for p, n in named if f"def {n}(" not in (root / p).read_text("utf-8")] == []
    listed = {int(n) for row in re.findall(r"(?m)^\| ([0-9 ]+) \|", __doc__ or "") for n in row.split()}
    here = {int(n) for n in re.findall(r"def test_(\d\d)_", Path(__file__).read_text("utf-8"))}
    assert listed | here == set(range(1, 21))
