"""Ids stay text until they are read, and are then what the engine sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.token_ids import TokenIds

IDS = st.lists(st.integers(0, 2**31 - 1))


@given(IDS, st.sampled_from([",", ", ", " ,\n"]))
def test_behaves_as_the_list(ids: list[int], comma: str) -> None:
    lazy = TokenIds.from_json(f"[{comma.join(map(str, ids))}]".encode())
    assert len(lazy) == len(ids) and bool(lazy) == bool(ids)
    assert lazy == ids and list(lazy) == ids and lazy[1:] == ids[1:]
    assert lazy == TokenIds.from_json(str(ids).encode()) and lazy != [*ids, 1]
    assert lazy.text == ",".join(map(str, ids)).encode()


@pytest.mark.parametrize("text", [b"null", b"{}", b'["a"]', b"[1.5]", b"[-1]", b"[true]", b"[[1]]", b"1"])
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        TokenIds.from_json(text)
