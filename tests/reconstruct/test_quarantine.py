"""Each reason to keep a call out, and that its tokens stay in the account."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from polar_mitm.types import Usage
from tests.reconstruct.calls import call, checked, follow

GOOD = call("g", [1, 2], [3])


@pytest.mark.parametrize(
    ("fields", "reason", "num_tokens"),
    [
        ({"status": "failed"}, "failed", 2),
        ({"status": "refused"}, "refused", 2),
        ({"prompt_token_ids": []}, "no_token_ids", 2),
        ({"completion_token_ids": [], "behaviour_logprobs": []}, "no_token_ids", 0),
        (
            {"completion_token_ids": [], "behaviour_logprobs": [], "usage": Usage(completion_tokens=7)},
            "no_token_ids",
            7,
        ),
        ({"behaviour_logprobs": [-1.0]}, "length_mismatch", 2),
        ({"behaviour_logprobs": []}, "length_mismatch", 2),
        ({"usage": Usage(completion_tokens=3)}, "length_mismatch", 3),
        ({"usage": Usage(completion_tokens=1)}, "length_mismatch", 2),
        ({"behaviour_logprobs": [-1.0, float("nan")]}, "bad_logprob", 2),
        ({"behaviour_logprobs": [-1.0, float("-inf")]}, "bad_logprob", 2),
        ({"behaviour_logprobs": [-1.0, -9999.0]}, "bad_logprob", 2),
        ({"behaviour_logprobs": [-1.0, 0.5]}, "bad_logprob", 2),
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


def test_logprob_zero_and_matching_usage_are_fine() -> None:
    certain = call("a", [1], [5], behaviour_logprobs=[0.0], usage=Usage(completion_tokens=1))
    assert checked([certain])[1].trained == 1


def test_every_copy_of_a_duplicate_call_id_is_quarantined() -> None:
    one, other = call("a", [1], [5]), call("a", [1], [6, 7])
    _, report = checked([one, other, follow("b", one, [2], [8])])
    assert report.quarantined == {"duplicate_call_id": 3} and report.num_calls == 3
    assert report.quarantined_calls == (("a", "duplicate_call_id"),) * 2


def test_an_account_that_does_not_add_up_says_so() -> None:
    _, report = checked([GOOD])
    assert not dataclasses.replace(report, trained=2).adds_up
