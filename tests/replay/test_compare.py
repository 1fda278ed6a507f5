"""The first field that differs, and all of them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.replay.compare import differences

LONG = "x" * 50
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


@pytest.mark.parametrize(
    ("recorded", "live", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, [("a.b[1]", "changed", "2", "3", None)]),
        ({"a": [1, 2]}, {"a": [1]}, [("a[1]", "missing", "2", "", None)]),
        ({"a": [1]}, {"a": [1, {"b": 2}]}, [("a[1]", "added", "", '{"b":2}', None)]),
        ({"a": 1, "b": 2}, {"a": 1}, [("b", "missing", "2", "", None)]),
        ({"a": 1}, {"a": 1, "b": None}, [("b", "added", "", "null", None)]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}, [("a", "order", "b, c", "c, b", None)]),
        ({"a": True}, {"a": 1}, [("a", "changed", "true", "1", None)]),
        ({"a": "1"}, {"a": 1}, [("a", "changed", "1", "1", None)]),
        ({"a": LONG + "1"}, {"a": LONG + "2"}, [("a", "changed", f"…{LONG[:24]}1", f"…{LONG[:24]}2", 50)]),
        ({"a": "go on"}, {"a": "go"}, [("a", "changed", "go on", "go", 2)]),
        (
            {"a": 1, "b": [{"c": 1}]},
            {"a": 2, "b": [{"c": 2}]},
            [("a", "changed", "1", "2", None), ("b[0].c", "changed", "1", "2", None)],
        ),
    ],
)  # fmt: skip
def test_fields_in_order(recorded: Any, live: Any, expected: list[tuple[Any, ...]]) -> None:
    found = [(d.field, d.kind, d.recorded, d.live, d.at) for d in differences(recorded, live)]
    assert found == expected


@given(JSON, JSON)
def test_no_difference_exactly_where_the_text_is_the_same(one: Any, other: Any) -> None:
    assert not list(differences(one, copy.deepcopy(one)))
    assert bool(list(differences(one, other))) == (json.dumps(one) != json.dumps(other))


@given(st.text(), st.text(), st.text())
def test_texts_are_told_apart_at_their_first_character(shared: str, one: str, other: str) -> None:
    found = list(differences({"a": shared + one}, {"a": shared + other}))
    if one == other:
        assert not found
    else:
        at = found[0].at
        assert at is not None and at >= len(shared)
        assert (shared + one)[:at] == (shared + other)[:at]
        assert (shared + one)[at : at + 1] != (shared + other)[at : at + 1]
