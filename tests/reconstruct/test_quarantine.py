"""Each reason to keep a call out, and that its tokens stay in the account."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from polar_mitm.columns import base_rows
from polar_mitm.reconstruct import build
from polar_mitm.types import Usage
from tests.reconstruct.calls import call, checked, follow, reasons
from tests.reconstruct.stored import stored

GOOD = call("g", [1, 2], [3])


@pytest.mark.parametrize(
    ("fields", "reason", "num_tokens"),
    [
        ({"status": "failed"}, "failed", 2),
        ({"status": "refused"}, "refused", 2),
        ({"fallback": "engine_ignored_token_input"}, "context_mismatch", 2),
        ({"prompt_token_ids": []}, "no_token_ids", 2),
        ({"completion_token_ids": [], "behaviour_logprobs": []}, "no_token_ids", 0),
        (
            {"completion_token_ids": [], "behaviour_logprobs": [], "usage": Usage(completion_tokens=7)},
            "no_token_ids",
            7,
        ),
        ({"behaviour_logprobs": [-1.0]}, "length_mismatch", 2),
        ({"behaviour_logprobs": []}, "no_logprobs", 2),
        ({"usage": Usage(completion_tokens=3)}, "length_mismatch", 3),
        ({"usage": Usage(completion_tokens=1)}, "length_mismatch", 2),
        ({"behaviour_logprobs": [-1.0, float("nan")]}, "bad_logprob", 2),
        ({"behaviour_logprobs": [-1.0, float("-inf")]}, "bad_logprob", 2),
        ({"behaviour_logprobs": [-1.0, -9999.0]}, "bad_logprob", 2),
        ({"behaviour_logprobs": [-1.0, 0.5]}, "bad_logprob", 2),
        ({"behaviour_logprobs": [-1e300, -1.0]}, "bad_logprob", 2),
        ({"completion_token_ids": [5, -1]}, "bad_token_id", 2),
        ({"prompt_token_ids": [1 << 31]}, "bad_token_id", 2),
        ({"prompt_token_ids": [1 << 80]}, "bad_token_id", 2),
    ],
)
def test_a_doubtful_call_is_quarantined(fields: dict[str, Any], reason: str, num_tokens: int) -> None:
    bad = call("a", [8, 9], [5, 6])
    for name, value in fields.items():
        setattr(bad, name, value)
    trajectories, report = checked([bad, GOOD])
    assert report.quarantined_calls == (("a", reason),)
    assert report.quarantined == {reason: num_tokens}
    assert [t.trajectory_id for t in trajectories] == ["g"] and report.trained == 1


def test_what_no_model_was_to_serve_is_neither_in_a_trajectory_nor_in_doubt() -> None:
    prewarm = call("w", [], [], role="auxiliary", notes=["prewarm"])
    trajectories, report = build([prewarm, GOOD])
    assert [t.trajectory_id for t in trajectories] == ["g"]
    assert (report.num_calls, report.quarantined, report.quarantined_calls) == (2, {}, ())
    prewarm.model_served = "m"  # then ids are missing
    assert build([prewarm, GOOD])[1].quarantined_calls == (("w", "no_token_ids"),)
    prewarm.model_served, prewarm.usage = "", Usage(completion_tokens=7)
    assert build([prewarm, GOOD])[1].quarantined == {"no_token_ids": 7}


def test_logprob_zero_and_matching_usage_are_fine() -> None:
    certain = call("a", [1], [5], behaviour_logprobs=[0.0], usage=Usage(completion_tokens=1))
    assert checked([certain])[1].trained == 1


def test_every_copy_of_a_duplicate_call_id_is_quarantined() -> None:
    one, other = call("a", [1], [5]), call("a", [1], [6, 7])
    _, report = checked([one, other, follow("b", one, [2], [8])])
    assert report.quarantined == {"duplicate_call_id": 3} and report.num_calls == 3
    assert report.quarantined_calls == (("a", "duplicate_call_id"),) * 2


MIXED = [
    call("a", [1], [2, 3], tokenizer="qwen", model_served="m"),
    follow("b", call("a", [1], [2, 3]), [4], [5], tokenizer="qwen", model_served="m"),
]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"tokenizer": "llama"}, "mixed_tokenizers"),
        ({"tokenizer": ""}, "mixed_tokenizers"),
        ({"model_served": "n"}, "mixed_models"),
    ],
)
def test_calls_that_cannot_be_of_one_policy_are_named_and_none_is_chosen(
    other: dict[str, str], reason: str
) -> None:
    odd = follow("c", MIXED[1], [6], [7], **{"tokenizer": "qwen", "model_served": "m", **other})
    trajectories, report = checked([*MIXED, odd])
    assert len(trajectories) == 0 and report.quarantined == {reason: 4}
    assert report.tokenizers == tuple(sorted({"qwen", other.get("tokenizer", "qwen")} - {""}))
    assert report.models_served == tuple(sorted({"m", other.get("model_served", "m")}))
    odd.status = "failed"
    assert checked([*MIXED, odd])[1].quarantined == {"failed": 1}, "what does not enter mixes nothing"


def test_replayed_answers_are_context_and_the_live_end_trains() -> None:
    replayed = call("a", [1], [2, 3], replayed_from="z", model_served="old")
    live = follow("b", replayed, [4], [5], model_served="new")
    trajectories, report = checked([replayed, live], include_orphans=True)
    assert reasons(trajectories) == {("b", "a"): "replayed"}
    assert report.masked == {"replayed": 2} and report.trained == 1


A = call("a", [1, 2], [3])
B = follow("b", A, [4], [5])
C = follow("c", B, [6], [7])


@pytest.mark.parametrize(
    ("bases", "lost"),
    [
        pytest.param({"b": ("nobody", 3), "c": ("b", 5)}, "bc", id="a base that is not there"),
        pytest.param({"b": ("a", 3), "c": ("b", 6)}, "c", id="a base that is too short"),
        pytest.param({"b": ("a", -1)}, "b", id="fewer than no tokens"),
        pytest.param({"a": ("c", 2), "b": ("a", 3), "c": ("b", 5)}, "abc", id="each on top of another"),
        pytest.param({"b": ("b", 1)}, "b", id="on top of itself"),
        pytest.param({"b": ("nobody", 0)}, "b", id="nothing of a base that is not there"),
    ],
)
def test_a_hole_in_the_store_costs_the_calls_that_stand_on_it(
    bases: dict[str, tuple[str, int]], lost: str
) -> None:
    trajectories, report = build(stored([A, B, C], bases))
    assert report.quarantined_calls == tuple((call_id, "lost_prefix") for call_id in lost)
    assert report.adds_up and report.trained == 3 - len(lost)
    left = [c for c in (A, B, C) if c.call_id not in lost]
    for one, other in zip(trajectories, build(left)[0], strict=True):
        assert one.spans == other.spans and one.token_ids.tolist() == other.token_ids.tolist()


def test_what_stands_on_either_of_two_calls_of_one_id_is_lost() -> None:
    twice = stored([A, B], {"b": ("a", 3)})
    twin = dataclasses.replace(twice, call_ids=["a", "a"], base=base_rows(["a", "a"], [None, "a"]))
    trajectories, report = build(twin)
    assert len(trajectories) == 0 and report.quarantined == {"duplicate_call_id": 2}


def test_a_call_that_is_kept_out_still_carries_what_is_stored_on_top_of_it() -> None:
    broken = follow("b", A, [4], [5], status="failed")
    (one,), report = checked([A, broken, C], columns=stored([A, broken, C], {"b": ("a", 3), "c": ("b", 5)}))
    assert one.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7] and report.quarantined == {"failed": 1}
    bad = call("a", [1, -2], [3])
    on_top, off = follow("b", bad, [4], [5]), call("c", [1, 9], [7])
    _, report = checked(
        [bad, on_top, off], columns=stored([bad, on_top, off], {"b": ("a", 3), "c": ("a", 1)})
    )
    assert report.quarantined_calls == (("a", "bad_token_id"), ("b", "bad_token_id"))


def test_an_account_that_does_not_add_up_says_so() -> None:
    _, report = checked([GOOD])
    assert not dataclasses.replace(report, trained=2).adds_up
