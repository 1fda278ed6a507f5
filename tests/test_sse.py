"""The decoder gives the same events for any split of the bytes (WHATWG HTML, 9.2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.sse import Event, EventTooLarge, SSEDecoder, encode


def decode(*chunks: bytes) -> list[Event]:
    decoder = SSEDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@pytest.mark.parametrize(
    ("wire", "events"),
    [
        (b"data: a\n\n", [Event("", b"a")]),
        (b"data:a\n\n", [Event("", b"a")]),
        (b"data:  a\n\n", [Event("", b" a")]),
        (b"event: ping\ndata: {}\n\n", [Event("ping", b"{}")]),
        (b"data: a\r\n\r\ndata: b\r\r", [Event("", b"a"), Event("", b"b")]),
        (b"data: a\ndata: b\n\n", [Event("", b"a\nb")]),
        (b": comment\n\n", []),
        (b"event: lonely\n\n", []),
        (b"\n\n\ndata: a\n\n\n\ndata: b\n\n", [Event("", b"a"), Event("", b"b")]),
        (b"id: 1\nretry: 5\ndata: a\n\n", [Event("", b"a")]),
        (b"\xef\xbb\xbfdata: a\n\n", [Event("", b"a")]),
        (b"\n\xef\xbb\xbfdata: a\n\n", []),
        (b"data: cut", []),
        (b"data\n\n", [Event("", b"")]),
    ],
)
def test_interpretation(wire: bytes, events: list[Event]) -> None:
    assert decode(wire) == events
    assert decode(*(wire[i : i + 1] for i in range(len(wire)))) == events


@given(
    st.lists(
        st.sampled_from([b"data: x", b"event: e", b":c", b"", b"\n", b"\r\n", b"\r", b"\n\n", b"y", b"data"])
    ),
    st.lists(st.integers(0, 200)),
)
def test_any_split_gives_the_same_events(pieces: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(pieces)
    points = sorted({min(c, len(wire)) for c in cuts})
    chunks = [wire[a:b] for a, b in zip([0, *points], [*points, len(wire)], strict=True)]
    assert decode(*chunks) == decode(wire)


@given(st.text("abé漢", min_size=0), st.sampled_from(["", "ping"]))
def test_encode_round_trip(data: str, event: str) -> None:
    assert decode(encode(data.encode(), event)) == [Event(event, data.encode())]


def test_an_endless_event_is_bounded() -> None:
    decoder = SSEDecoder(max_event_bytes=100)
    with pytest.raises(EventTooLarge):
        for _ in range(20):
            decoder.feed(b"data: 0123456789\n"[:11])


@given(
    st.lists(st.integers(0, 30).map(lambda n: b"data: " + b"x" * n + b"\n\n")),
    st.lists(st.integers(0, 400)),
)
def test_any_split_gives_the_same_events_before_one_too_large(pieces: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(pieces)
    points = sorted({min(c, len(wire)) for c in cuts})
    chunks = [wire[a:b] for a, b in zip([0, *points], [*points, len(wire)], strict=True)]

    def outcome(chunks: list[bytes]) -> tuple[list[Event], bool]:
        decoder, events = SSEDecoder(max_event_bytes=26), []
        try:
            for chunk in chunks:
                events += decoder.feed(chunk)
        except EventTooLarge as error:
            return events + error.events, True
        return events, False

    good = next((n for n, piece in enumerate(pieces) if len(piece) - 2 > 26), len(pieces))
    assert outcome(chunks) == outcome([wire]) == (decode(*pieces[:good]), good < len(pieces))
