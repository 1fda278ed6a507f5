"""Calls gone wrong, a few of each dialect: `tests/bench/bench_fuzz.py` has the million."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engine_bytes import split
from tests.support.fuzzing import KINDS, case, play

numbers = st.integers(0, 2**32)


@pytest.mark.parametrize("kind", KINDS)
@given(number=numbers)
@settings(max_examples=40)
def test_any_call_gets_an_answer_of_its_provider(kind: str, number: int) -> None:
    assert play(case(Random(number), kind)).problems == []


@pytest.mark.parametrize("kind", KINDS)
@given(number=numbers, cuts=st.lists(st.integers(0, 100_000), max_size=20))
@settings(max_examples=30)
def test_any_split_of_an_engines_bytes_gives_the_same_answer(kind: str, number: int, cuts: list[int]) -> None:
    made = replace(case(Random(number), kind), ending="finish", opened=True, waiting=False)
    data = b"".join(made.chunks)
    whole = play(replace(made, chunks=[data]))
    assert play(replace(made, chunks=split(data, cuts))) == whole and not whole.problems


def test_requests_are_accepted_and_refused_of_every_dialect() -> None:
    """Nothing would be learnt of a request that is always wrong."""
    for kind in KINDS:
        found = {play(case(Random(number), kind)).status for number in range(40)}
        assert {"ok", "refused", "failed"} <= found, kind
