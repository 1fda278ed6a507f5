"""Equality of contexts, and that one changed element is found at its place."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.types import ModelCall
from tests.reconstruct.calls import call, follow
from tests.verify.paths import built, conversation, verified


async def test_what_was_built_is_equal() -> None:
    root = call("a", range(100, 110), range(200, 204))
    calls = [root, follow("b", root, [1], [2, 3]), follow("c", root, [4], [5, 6])]
    report = await verified(calls)
    assert (report.num_trajectories, report.num_calls, report.num_equal) == (2, 3, 3)
    assert (report.sampled, report.trained) == (8, 8)
    assert report.sound and report.accounted and not report.differences


@given(st.data())
async def test_one_changed_id_is_found_at_its_place(data: st.DataObject) -> None:
    calls = conversation(3)
    [path], _ = built(calls)
    at = data.draw(st.integers(0, path.token_ids.size - 1))
    path.token_ids[at] += 1
    report = await verified(calls, [path])
    holder = next(span for span in path.spans if at < span.end)
    first = report.differences[0]
    assert (first.call_id, first.position) == (holder.call_id, at)
    assert first.what == ("completion" if at >= holder.sampled_start else "prompt")
    assert (first.recorded, first.found) == (path.token_ids[at] - 1, path.token_ids[at])
    after = [span.call_id for span in path.spans if span.end > at]
    assert [d.call_id for d in report.differences] == after, "each later call was sampled under that id"
    assert report.num_equal == 3 - len(after)
    assert not report.sound


@given(st.data())
async def test_one_changed_logprob_is_found_at_its_place(data: st.DataObject) -> None:
    calls = conversation(3)
    [path], _ = built(calls)
    at = data.draw(st.sampled_from(np.flatnonzero(path.loss_mask).tolist()))
    path.behaviour_logprobs[at] = np.nextafter(path.behaviour_logprobs[at], np.float32(-9), dtype=np.float32)
    [difference] = (await verified(calls, [path])).differences
    assert (difference.what, difference.position) == ("logprob", at)


@given(st.data())
async def test_one_flipped_mask_is_found_at_its_place(data: st.DataObject) -> None:
    calls = conversation(3)
    [path], _ = built(calls)
    at = data.draw(st.integers(0, path.token_ids.size - 1))
    path.loss_mask[at] ^= 1
    report = await verified(calls, [path])
    [difference] = report.differences
    assert (difference.what, difference.position) == ("loss_mask", at)
    assert not report.accounted


async def test_one_changed_prompt_id_of_a_record_is_found_at_its_place() -> None:
    calls = conversation(3)
    [path], _ = built(calls)
    changed = [*calls[2].prompt_token_ids]
    changed[12] = 7
    report = await verified([*calls[:2], _with_prompt(calls[2], changed)], [path])
    [difference] = report.differences
    assert (difference.call_id, difference.what, difference.position) == ("c", "prompt", 12)
    assert (difference.recorded, difference.found) == (7, path.token_ids[12])


async def test_a_prompt_that_is_longer_or_shorter_differs_where_one_ends() -> None:
    calls = conversation(2)
    [path], _ = built(calls)
    size = len(calls[1].prompt_token_ids)
    for prompt, recorded in ([*calls[1].prompt_token_ids, 5], 5), (calls[1].prompt_token_ids[:-1], None):
        [difference] = (await verified([calls[0], _with_prompt(calls[1], prompt)], [path])).differences
        assert difference.position == min(size, len(prompt))
        assert difference.recorded == recorded


async def test_a_call_that_is_not_recorded_is_named() -> None:
    calls = conversation(2)
    paths, _ = built(calls)
    report = await verified(calls[:1], paths)
    assert [(d.call_id, d.what) for d in report.differences] == [("b", "missing_call")]
    assert not report.sound


async def test_a_call_that_trains_twice_is_named() -> None:
    calls = conversation(2)
    [path], _ = built(calls)
    report = await verified(calls, [path, replace(path, trajectory_id="again")])
    assert {(d.trajectory_id, d.call_id, d.what) for d in report.differences} == {
        ("again", "a", "trained_twice"),
        ("again", "b", "trained_twice"),
    }


async def test_a_trajectory_that_is_missing_leaves_the_account_open() -> None:
    calls = conversation(2)
    report = await verified(calls, [])
    assert not report.accounted and not report.sound


async def test_a_call_that_came_after_the_build_leaves_the_account_open() -> None:
    calls = conversation(2)
    paths, account = built(calls)
    report = await verified([*calls, call("z", [1], [2])], paths, account=account)
    assert account.adds_up and not report.differences
    assert not report.accounted and not report.sound


def _with_prompt(of: ModelCall, prompt: list[int]) -> ModelCall:
    return msgspec.structs.replace(of, prompt_token_ids=prompt)
