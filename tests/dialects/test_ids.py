"""Ids that we mint can be read back; nobody else's can."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.ids import Seal, call_id_of, minted, new_id, seal, unseal

PREFIXES = ["msg", "resp", "toolu", "call", "rs", "fc", "ctc", "cmp", "req"]


def test_new_ids_are_unique_and_in_the_order_of_their_making(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert {len(one) for one in ids} == {26}
    assert not set("".join(ids)) - set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
    later = []
    for millisecond in (1, 1_700_000_000_000, 1_700_000_000_001, 2**48 - 1):
        monkeypatch.setattr("time.time_ns", lambda m=millisecond: m * 1_000_000)
        later.append(new_id())
    assert later == sorted(later) and later[-1].startswith("7ZZZZZZZZZ")


@pytest.mark.parametrize("prefix", PREFIXES)
@given(index=st.none() | st.integers(0, 10_000))
def test_a_minted_id_holds_its_call(prefix: str, index: int | None) -> None:
    call_id = new_id()
    assert call_id_of(minted(prefix, call_id, index)) == call_id


@pytest.mark.parametrize(
    "wire_id",
    [
        "",
        "msg_",
        "msg_01ABCDEF",
        "toolu_01A09q90qw90lq917835lq9",
        "call_abc123",
        "other_01JD0Z6Q3WAAAAAAAAAAAAAAAA",
        "01JD0Z6Q3WAAAAAAAAAAAAAAAA",
        "msg_01JD0Z6Q3WAAAAAAAAAAAAAAAA\n",
        "msg_01JD0Z6Q3WAAAAAAAAAAAAAAAA_",
        "msg_01JD0Z6Q3WAAAAAAAAAAAAAAAA_x",
        "xmsg_01JD0Z6Q3WAAAAAAAAAAAAAAAA",
        "msg_01jd0z6q3waaaaaaaaaaaaaaaa",
        "msg_01JD0Z6Q3WAAAAAAAAAAAAAAAI",
    ],
)
def test_anybody_elses_id_holds_nothing(wire_id: str) -> None:
    assert call_id_of(wire_id) is None


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.none() | st.text(st.characters(codec="utf-8")))
def test_a_seal_gives_back_what_it_holds(call_id: str, text: str | None) -> None:
    blob = seal(call_id, text)
    assert blob.isascii() and blob
    assert unseal(blob) == Seal(call_id, text)


@given(st.text(), st.binary(max_size=60), st.integers(0, 60))
def test_nothing_else_is_a_seal(text: str, data: bytes, cut: int) -> None:
    head = seal("x")[:7]
    assert unseal(text) is None or text.startswith(head)
    for blob in (
        head + text,
        head + base64.b64encode(data).decode(),
        head + base64.b64encode(zlib.compress(data)).decode(),
        seal("call", "text")[: min(cut, len(seal("call", "text")) - 1)],
    ):
        found = unseal(blob)
        assert found is None or isinstance(found.call_id, str)


def test_a_seal_is_no_bomb() -> None:
    bomb = seal("")[:7] + base64.b64encode(zlib.compress(bytes(64 << 20), 9)).decode()
    assert unseal(bomb) is None
