"""The plan of an answer: all of its bytes, once, in order, and in time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.replay.pacing import plan
from polar_mitm.types import Wire

CHUNKS = st.lists(st.tuples(st.binary(min_size=1, max_size=8), st.floats(0, 100)), max_size=8)


def recorded(chunks: list[tuple[bytes, float]]) -> Wire:
    chunks = sorted(chunks, key=lambda chunk: chunk[1])
    body = b"".join(data for data, _ in chunks)
    sizes, times = [len(data) for data, _ in chunks], [at for _, at in chunks]
    return Wire(response_body=body, chunk_sizes=sizes, chunk_at_ms=times)


@given(CHUNKS)
def test_as_recorded(chunks: list[tuple[bytes, float]]) -> None:
    wire = recorded(chunks)
    pieces = plan(wire, fast=False)
    assert [len(data) for _, data in pieces] == wire.chunk_sizes
    assert [at for at, _ in pieces] == [at_ms / 1000 for at_ms in wire.chunk_at_ms]
    assert b"".join(data for _, data in pieces) == wire.response_body


@given(CHUNKS)
def test_fast(chunks: list[tuple[bytes, float]]) -> None:
    wire = recorded(chunks)
    pieces = plan(wire, fast=True)
    assert b"".join(data for _, data in pieces) == wire.response_body
    assert {at for at, _ in pieces} <= {0.0} and len(pieces) <= 2
    if chunks:
        assert len(pieces[-1][1]) == wire.chunk_sizes[-1]  # the last piece waits for the record


@given(CHUNKS, st.binary(max_size=80))
def test_a_body_that_redaction_changed_is_still_sent_whole(
    chunks: list[tuple[bytes, float]], body: bytes
) -> None:
    wire = recorded(chunks)
    wire.response_body = body
    for fast in (False, True):
        pieces = plan(wire, fast=fast)
        assert b"".join(data for _, data in pieces) == body and all(data for _, data in pieces)
