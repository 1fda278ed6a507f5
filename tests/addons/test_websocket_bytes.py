"""The WebSocket's bytes: however they are cut, and whatever they are, between mitmproxy and the messages."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mitmproxy import http
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.extensions import PerMessageDeflate
from wsproto.utilities import LocalProtocolError

from polar_mitm_addons.websocket import Socket, accept
from tests.support.engine_bytes import split

FLOW = cast(http.HTTPFlow, SimpleNamespace(client_conn=SimpleNamespace(id="c"), live=True))
LIMIT = 1_000


def pair(compressed: bool) -> tuple[Connection, Socket]:
    """A client, and the server's side of it."""
    offers = [PerMessageDeflate() for _ in range(2)] if compressed else []
    for offer in offers:
        offer.finalize("permessage-deflate")
    socket = Socket(FLOW, offers[1] if offers else None, LIMIT)
    return Connection(ConnectionType.CLIENT, list(offers[:1])), socket


async def waiting(socket: Socket) -> list[bytes]:
    """The messages that have come."""
    found = []
    while not socket.closed:
        try:
            message = await asyncio.wait_for(socket.next(), 0.001)
        except TimeoutError:
            break
        assert message is not None
        found.append(message)
    return found


@given(
    texts=st.lists(st.text(max_size=60), max_size=4),
    cuts=st.lists(st.integers(0, 1000), max_size=6),
    compressed=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_split_gives_the_same_messages(texts: list[str], cuts: list[int], compressed: bool) -> None:
    async def run() -> None:
        client, socket = pair(compressed)
        sent = b""
        for number, text in enumerate(texts):
            if (
                not compressed
            ):  # wsproto loses compressed fragments around a control frame; no client sends any
                sent += client.send(TextMessage(text[:2], message_finished=False))
                text = text[2:]
            sent += client.send(Ping(b"%d" % number))
            sent += client.send(TextMessage(text))
        for piece in split(sent, cuts):
            client.receive_data(socket.received(piece))
        pongs = [event.payload for event in client.events() if isinstance(event, Pong)]
        assert pongs == [b"%d" % number for number in range(len(texts))]
        assert await waiting(socket) == [text.encode() for text in texts]

    asyncio.run(run())


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=4), compressed=st.booleans())
@settings(deadline=None, max_examples=150)
def test_garbage_closes_and_never_raises(data: bytes, cuts: list[int], compressed: bool) -> None:
    async def run() -> None:
        client, socket = pair(compressed)
        good = client.send(TextMessage("good"))
        socket.received(good)
        for piece in split(data, cuts):
            socket.received(piece)
        assert socket.closed or (await waiting(socket))[:1] == [b"good"]

    asyncio.run(run())


async def test_a_bomb_is_not_swallowed() -> None:
    client, socket = pair(compressed=True)
    bomb = client.send(BytesMessage(b"0" * 50_000_000))
    assert len(bomb) < 100_000
    answered = b"".join(socket.received(piece) for piece in split(bomb, list(range(0, 100_000, 4096))))
    client.receive_data(answered)
    (close,) = client.events()
    assert isinstance(close, CloseConnection) and close.code == 1009
    assert await waiting(socket) == []


async def test_what_waits_has_a_limit_too() -> None:
    client, socket = pair(compressed=False)
    out = b"".join(socket.received(client.send(TextMessage("x" * 300))) for _ in range(4))
    client.receive_data(out)
    assert [event.code for event in client.events() if isinstance(event, CloseConnection)] == [1009]
    assert await waiting(socket) == []


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_close_is_answered_and_ends_what_is_under_way(cancelled: bool) -> None:
    client, socket = pair(compressed=False)
    left: list[Any] = []
    if cancelled:
        socket.current = cast(Any, SimpleNamespace(cancel=lambda: left.append(True)))
    client.receive_data(socket.received(client.send(CloseConnection(1000, "bye"))))
    (echo,) = client.events()
    assert isinstance(echo, CloseConnection) and echo.code == 1000 and socket.closed
    socket.gone()
    assert left == [True] * cancelled and await socket.next() is None
    assert not await socket.send(b'{"too":"late"}\n')


# --- frames that are nearly right ------------------------------------------------------------------------

_FRAMES = st.lists(
    st.sampled_from(
        [
            TextMessage("hé", message_finished=False),
            TextMessage("llo"),
            TextMessage("x" * 300),
            BytesMessage(b"\xff\xfe"),
            Ping(b"p"),
            Pong(b"p"),
            CloseConnection(1000, "bye"),
            CloseConnection(4999, "é" * 40),
        ]
    ),
    min_size=1,
    max_size=6,
)
_CHANGES = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), max_size=3)


@given(
    frames=_FRAMES,
    changes=_CHANGES,
    cuts=st.lists(st.integers(0, 1000), max_size=4),
    compressed=st.booleans(),
)
@settings(max_examples=100)
def test_changed_frames_get_frames_or_nothing(
    frames: list[Any], changes: list[tuple[int, int]], cuts: list[int], compressed: bool
) -> None:
    """What is said to them a client can read, and nothing more is said once the connection is over."""

    async def run() -> None:
        client, socket = pair(compressed)
        data = bytearray()
        for frame in frames:
            try:
                data += client.send(frame)
            except LocalProtocolError:  # after a close, or between fragments
                break
        for at, byte in changes:
            data[at % len(data)] = byte
        answered = b"".join(socket.received(piece) for piece in split(bytes(data), cuts))
        reader, _ = pair(compressed)
        reader.receive_data(answered)
        said = list(reader.events())
        assert all(isinstance(event, Pong | Ping | CloseConnection) for event in said)
        closes = [event for event in said if isinstance(event, CloseConnection)]
        assert len(closes) <= 1 and (not closes or closes[0].code not in (1005, 1006))
        for message in await waiting(socket):
            assert len(message) <= LIMIT

    asyncio.run(run())


_header = st.text(st.characters(max_codepoint=0xFF), max_size=30).map(lambda text: text.encode("latin-1"))
_offer = st.lists(
    st.sampled_from(
        [
            "permessage-deflate",
            "client_max_window_bits",
            "server_max_window_bits=",
            "=99",
            "8",
            ";",
            ",",
            '"',
            " ",
        ]
    ),
    max_size=8,
).map(lambda parts: "".join(parts).encode())


@given(key=_header, offer=_offer | _header)
@settings(max_examples=150)
def test_any_upgrade_is_accepted_or_is_not(key: bytes, offer: bytes) -> None:
    request = http.Request.make("GET", "http://host/v1/responses")
    request.headers = http.Headers(
        [
            (b"sec-websocket-key", key),
            (b"sec-websocket-version", b"13"),
            (b"sec-websocket-extensions", offer),
        ]
    )
    found = accept(request)
    if found is not None:
        response, deflate = found
        assert response.status_code == 101 and len(response.headers["sec-websocket-accept"]) == 28
        assert ("sec-websocket-extensions" in response.headers) == (deflate is not None)
