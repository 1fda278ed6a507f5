"""Group advantages against the slow reference, and the groups from which nothing can be learned."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm_trainer.advantages import group_advantages
from polar_mitm_trainer.config import AdvantageConfig
from tests.trainer import float64

# Halves and eighths: no group's variance is nought but for rounding.
REWARDS = st.none() | st.integers(-8, 8).map(lambda n: n / 8) | st.sampled_from([0.0, 1.0])
STEPS = st.lists(st.tuples(REWARDS, st.sampled_from("abcde")), max_size=24)


@given(STEPS, st.booleans(), st.booleans())
def test_they_equal_the_slow_reference(
    step: list[tuple[float | None, str]], std: bool, leave_one_out: bool
) -> None:
    rewards, groups = [reward for reward, _ in step], [group for _, group in step]
    config = AdvantageConfig(std=std, leave_one_out=leave_one_out)
    found = group_advantages(rewards, groups, config)
    known = float64.advantages(rewards, groups, std, leave_one_out)
    assert found.shape == (len(step),) and found.dtype == np.float64
    np.testing.assert_allclose(
        found, np.array([np.nan if each is None else each for each in known], dtype=float), atol=1e-12
    )
    for group in set(groups):
        of_group = found[[each == group for each in groups]]
        assert np.isnan(of_group).all() or abs(np.nansum(of_group)) < 1e-9, "no group moves as a whole"


def test_groups_that_teach_nothing_are_left_out() -> None:
    rewards = [1.0, 0.0, None, 0.7, 0.7, 3.0, None, None]
    found = group_advantages(rewards, list("aaabbcdd"), AdvantageConfig(std=False))
    np.testing.assert_array_equal(found, [0.5, -0.5] + [np.nan] * 6)


def test_equal_rewards_that_rounding_parts_are_equal() -> None:
    found = group_advantages([0.1 + 0.2, 0.3, 0.3], ["a"] * 3, AdvantageConfig())
    assert np.isnan(found).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e308, -1e31])
def test_a_reward_that_is_no_number_is_refused_by_place_and_group(bad: float) -> None:
    with pytest.raises(
        ValueError, match=rf"1 of 3 rewards.*{re.escape(str(bad))} \(number 2, group task-7\)"
    ):
        group_advantages([1.0, None, bad], ["a", "a", "task-7"], AdvantageConfig())


def test_each_reward_has_a_group() -> None:
    with pytest.raises(ValueError, match="shorter"):
        group_advantages([1.0, 0.0], ["a"], AdvantageConfig())


def test_it_needs_no_torch() -> None:
    modules = "sys, polar_mitm_trainer.advantages, polar_mitm_trainer.loss_defaults"
    script = f"import {modules}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "False\n"
