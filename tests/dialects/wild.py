"""Any JSON, in the words of an API, so that much of it comes near to a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st


def any_json(keys: Sequence[str], words: Sequence[str]) -> st.SearchStrategy[Any]:
    """Values whose objects have some of `keys`, and whose texts are some of `words`."""
    leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(words)
    return st.recursive(
        leaf,
        lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(keys), v, max_size=5),
        max_leaves=20,
    )
