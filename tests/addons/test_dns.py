"""The sandbox's resolver: provider names have one address, nothing else exists, and the answer is at once."""

from __future__ import annotations

import asyncio
import socket
import struct
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm_addons.dns import PROVIDER_ADDRESS, DNSMessage, answer
from polar_mitm_addons.listeners import _reply_from
from tests.support.held_engine import DEADLINE_S
from tests.support.rig import rig, settled

A, NS, MX, TXT, AAAA, HTTPS, ANY = 1, 2, 15, 16, 28, 65, 255
NOERROR, NXDOMAIN = 0, 3
IP_PKTINFO = 8


def query(name: str, kind: int = A, *, edns: bool = False, flags: int = 0x0100) -> bytes:
    """A query as a stub resolver sends it (RFC 1035, section 4)."""
    head = struct.pack("!6H", 0x1234, flags, 1, 0, 0, int(edns))
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part)
    opt = b"\0" + struct.pack("!HHIH", 41, 1232, 0, 0) if edns else b""
    return head + labels + b"\0" + struct.pack("!HH", kind, 1) + opt


def ask(data: bytes) -> tuple[bytes, list[str]]:
    """The answer's bytes, and the names that were refused."""
    refused: list[str] = []
    allowed = {"api.anthropic.com", "API.Anthropic.com"}
    return answer(data, lambda name: name in allowed, refused.append), refused


@pytest.mark.parametrize("edns", [False, True])
@pytest.mark.parametrize("name", ["api.anthropic.com", "API.Anthropic.com"])
def test_a_provider_has_one_address(name: str, edns: bool) -> None:
    reply, refused = ask(query(name, edns=edns))
    message = DNSMessage.unpack(reply)
    assert (message.id, message.query, message.response_code) == (0x1234, False, NOERROR)
    assert message.question is not None and message.question.name == name  # case for case: some check it
    (record,) = message.answers
    assert (record.type, record.name) == (A, name)
    assert IPv4Address(record.data) == PROVIDER_ADDRESS
    assert refused == []


@pytest.mark.parametrize("kind", [AAAA, HTTPS, MX, TXT, NS, ANY, 65280])
def test_other_records_of_a_provider_are_empty_not_missing(kind: int) -> None:
    # NXDOMAIN for AAAA would make resolvers drop the A record too (RFC 8020).
    reply, refused = ask(query("api.anthropic.com", kind))
    message = DNSMessage.unpack(reply)
    assert (message.response_code, list(message.answers), refused) == (NOERROR, [], [])


@pytest.mark.parametrize("kind", [A, AAAA, TXT, HTTPS])
@pytest.mark.parametrize(
    "name", ["evil.example", "secret-data.evil.example", "localhost", "x" * 63 + ".example"]
)
def test_nothing_else_exists(name: str, kind: int) -> None:
    reply, refused = ask(query(name, kind))
    message = DNSMessage.unpack(reply)
    assert (message.id, message.response_code, list(message.answers)) == (0x1234, NXDOMAIN, [])
    assert refused == [name]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 12,
        query("evil.example")[:20],
        query("api.anthropic.com", flags=0x8180),  # an answer
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_query_has_no_answer(data: bytes) -> None:
    assert ask(data) == (b"", [])


@given(st.binary(max_size=200), st.integers(0, 40))
def test_any_bytes_are_taken(data: bytes, cut: int) -> None:
    for broken in (data, query("api.anthropic.com")[:cut] + data):
        assert isinstance(ask(broken)[0], bytes)


# --- the listener ---------------------------------------------------------------------------------------


async def test_a_passed_socket_answers_from_the_address_that_was_asked() -> None:
    async with rig("http://127.0.0.1:9") as r:
        box = await r.box("other")
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        sock.bind(("0.0.0.0", 0))
        port = sock.getsockname()[1]
        tcp = socket.create_server(("127.0.0.1", 0))
        await r.interceptor.serve(box.session.__class__("r1"), [sock, tcp])
        loop = asyncio.get_running_loop()
        for address in ("127.0.0.1", "127.9.8.7"):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.setblocking(False)
                client.connect((address, port))  # takes answers from this address only
                for data, code in (
                    (query("api.openai.com"), NOERROR),
                    (b"nonsense", None),
                    (query("Evil.Example"), NXDOMAIN),
                ):
                    await loop.sock_sendall(client, data)
                    if code is not None:
                        reply = await asyncio.wait_for(loop.sock_recv(client, 4096), DEADLINE_S)
                        assert DNSMessage.unpack(reply).response_code == code
        assert [(e.rollout_id, e.layer, e.name) for e in r.recorder.events] == [
            ("r1", "dns", "evil.example")
        ] * 2


async def test_a_closed_rollout_resolves_nothing() -> None:
    async with rig("http://127.0.0.1:9") as r:
        box = await r.box()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        address = sock.getsockname()
        session = type(box.session)("resolver")
        await r.interceptor.serve(session, [sock])
        await r.interceptor.chain.listeners.close(session)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(query("evil.example"), address)
            await settled()
        assert sock.fileno() == -1 and r.recorder.events == []


def test_answers_leave_from_the_address_that_was_asked() -> None:
    asked = socket.inet_aton("9.9.9.9")
    info = struct.pack("=I4s4s", 7, socket.inet_aton("127.0.0.1"), asked)
    ((level, kind, data),) = _reply_from([(socket.IPPROTO_IP, IP_PKTINFO, info)])
    assert (level, kind, data) == (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=I4s4s", 0, asked, bytes(4)))
    address = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    info = address + struct.pack("=I", 7)
    assert _reply_from([(0, 0, b""), (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)]) == [
        (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, address + bytes(4))
    ]
    assert _reply_from([]) == []
