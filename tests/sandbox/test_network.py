"""Nothing leaves the sandbox; whatever it dials on 80, 443 and 53 reaches its own listeners."""

from __future__ import annotations

import socket
import sys

import pytest

from polar_mitm_sandbox import seccomp
from tests.sandbox.driver import ANSWERED_ADDRESS
from tests.sandbox.users import User

ASK = """
import json, socket, sys
def ask(address, port):
    with socket.create_connection((address, port), timeout=10) as s:
        s.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
        return s.recv(4096).partition(b"\\r\\n\\r\\n")[2].decode().split()
"""


def test_every_address_reaches_the_listener_and_keeps_its_destination(user: User) -> None:
    addresses = ["8.8.8.8", "127.0.0.1", "10.1.2.3", "169.254.169.254", "2001:4860:4860::8888", "::1"]
    code = f"{ASK}print(json.dumps([ask(a, p) for a in {addresses} for p in (80, 443)]))"
    seen = user.python(code, who="w7").json()
    wanted = [a if ":" in a else f"::ffff:{a}" for a in addresses]
    assert seen == [["w7", address, port] for address in wanted for port in ("80", "443")]


def test_every_name_resolves_through_the_listener(user: User) -> None:
    out = user.shell(
        "curl -sS http://a.name.nobody.registered/; echo; curl -sS http://api.openai.com:443/", who="w"
    )
    assert out.stdout.split("\n") == [
        f"w ::ffff:{ANSWERED_ADDRESS} 80",
        f"w ::ffff:{ANSWERED_ADDRESS} 443",
    ], out


def test_names_are_answered_from_the_address_that_was_asked(user: User) -> None:
    # A connected datagram socket takes answers from its peer's address only.
    code = """
import json, socket, struct
query = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + b"\\1a\\4test\\0" + struct.pack(">HH", 1, 1)
out = []
for family, server in ((socket.AF_INET, "8.8.4.4"), (socket.AF_INET6, "2606:4700::1111"), (socket.AF_INET, "127.0.0.53")):
    s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(10); s.connect((server, 53)); s.send(query)
    out.append(socket.inet_ntoa(s.recv(4096)[-4:]))
print(json.dumps(out))
"""  # noqa: E501
    assert user.python(code).json() == [ANSWERED_ADDRESS] * 3


def test_other_ports_are_refused_at_once(user: User) -> None:
    code = """
import json, socket
out = {}
for family, host in ((socket.AF_INET, "9.9.9.9"), (socket.AF_INET6, "2620:fe::fe")):
    for port in (22, 25, 53, 853, 3128, 8080, 11434):
        s = socket.socket(family); s.settimeout(10); out[f"tcp {host} {port}"] = s.connect_ex((host, port))
    for port in (123, 443, 4789):
        s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(10); s.connect((host, port)); s.send(b"x")
        try: s.recv(1)
        except OSError as error: out[f"udp {host} {port}"] = error.errno
print(json.dumps(out))
"""
    assert set(user.python(code).json().values()) == {111}  # ECONNREFUSED


def test_there_is_no_interface_but_lo(user: User) -> None:
    out = user.shell(
        "tail -n +3 /proc/net/dev | cut -d: -f1; tail -n +2 /proc/net/route; cat /proc/net/arp | tail -n +2"
    )
    assert out.stdout.split() == ["lo"]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_services_of_the_host_are_out_of_reach(user: User, family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family) as server:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection((host, port)):
            pass  # reachable from here
        code = f"import socket; print(socket.socket({int(family)}).connect_ex(('{host}', {port})))"
        assert user.python(code).json() == 111


def test_unix_sockets_of_the_host_are_out_of_reach(user: User) -> None:
    with (
        user.directory() as outside,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        path = f"{outside}/service.sock"
        named.bind(path)
        abstract.bind(f"\0{outside}")
        for server in (named, abstract):
            server.listen()
        code = f"""
import json, socket
print(json.dumps([socket.socket(socket.AF_UNIX).connect_ex(name) for name in ({path!r}, "\\0{outside}")]))
"""
        assert user.python(code).json() == [2, 111]  # ENOENT, ECONNREFUSED


def test_sockets_of_other_kinds_cannot_be_made(user: User) -> None:
    code = """
import errno, json, socket
out = {}
for family in range(64):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        try: socket.socket(family, kind)
        except OSError as error: out.setdefault(family, set()).add(errno.errorcode[error.errno])
        else: out.setdefault(family, set()).add("made")
print(json.dumps({family: sorted(what) for family, what in out.items()}))
"""
    made = user.python(code).json()
    allowed = {str(int(family)) for family in seccomp.ALLOWED_FAMILIES}
    assert {family for family, what in made.items() if what != ["EAFNOSUPPORT"]} == allowed
    for family in (socket.AF_INET, socket.AF_INET6):  # no raw packets, so no spoofed ones
        code = f"import socket; socket.socket({int(family)}, socket.SOCK_RAW, 1)"
        assert "PermissionError" in user.python(code).stderr


def test_the_network_cannot_be_changed(user: User) -> None:
    code = """
import socket, struct
link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
body = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex("lo"), 0, 1)  # RTM_NEWLINK: lo down
link.send(struct.pack("=IHHII", 16 + len(body), 16, 5, 1, 0) + body)
print(-struct.unpack_from("=i", link.recv(4096), 16)[0])
"""
    assert user.python(code).json() == 1  # EPERM


def test_silent_connections_do_not_keep_others_from_being_answered(user: User) -> None:
    code = f"""{ASK}
idle = [socket.create_connection(("1.1.1.1", 443)) for _ in range(200)]
print(json.dumps(ask("1.1.1.1", 443)))
"""
    assert user.python(code, who="w").json() == ["w", "::ffff:1.1.1.1", "443"]


def test_64_sandboxes_reach_their_own_listeners(user: User) -> None:
    code = f"{ASK}print(json.dumps([ask(f'10.0.0.{{n}}', 443)[0] for n in range(1, 21)]))"
    with user.directory() as top:
        runs = []
        for number in range(64):
            workdir = user.own(top / str(number))
            runs.append(
                {"who": f"w{number}", "command": [sys.executable, "-c", code], "workdir": str(workdir)}
            )
        outcomes = user.sandboxes(runs)
    assert [outcome.json() for outcome in outcomes] == [[f"w{number}"] * 20 for number in range(64)]
