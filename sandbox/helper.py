"""The first program of a sandbox: makes its network, hands the listeners out, then becomes bubblewrap.

A script, not a module; standard library only:
`python -ISB helper.py CONTROL_FD USERNS RLIMITS FDS -- COMMAND`.
`helper.py probe USERNS` only tries steps 1 to 3 and says on stderr what failed.

0. Close every descriptor but the standard ones, CONTROL_FD and FDS: an open socket or directory of whoever
   started us would be a way out.
1. Enter a new network namespace (and, with USERNS "1", a new user namespace in which we are root).
2. Bring `lo` up and make every IPv4 and IPv6 address local (AnyIP, ip-route(8) "local"): whatever address
   the harness dials, it reaches a listener of this namespace.
3. Listen on TCP 443 and 80 and UDP 53, and pass the sockets over CONTROL_FD, an inherited SOCK_SEQPACKET
   socket: no path on disk, so nobody else can register listeners in this sandbox's name.
4. Wait for the acknowledgement that somebody accepts on them; end of file means that the parent is gone.
5. Close everything and exec COMMAND with an empty environment (its pid 1 is visible inside the sandbox).

Failures go over CONTROL_FD as one message starting with `error: `.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG = 1
IP_PKTINFO, IPV6_RECVPKTINFO, IPV6_FREEBIND = 8, 49, 78
RTM_NEWLINK, RTM_NEWROUTE = 16, 24
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE = 1, 4, 0x100, 0x400
BACKLOG = 512


def main() -> None:
    if sys.argv[1] != "probe":
        close_all_but({0, 1, 2, int(sys.argv[1]), *map(int, filter(None, sys.argv[4].split(",")))})
    try:
        enter_namespaces(new_user=sys.argv[2] == "1")
        make_every_address_local()
        listeners = open_listeners()
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}")
    if sys.argv[1] == "probe":
        return
    control = socket.socket(fileno=int(sys.argv[1]))
    socket.send_fds(control, [b"listeners"], [s.fileno() for s in listeners])
    if control.recv(16) != b"go":
        sys.exit(1)
    for opened in (*listeners, control):
        opened.close()
    set_limits(sys.argv[3])
    command = sys.argv[sys.argv.index("--") + 1 :]
    os.execve(command[0], command, {"PATH": os.defpath})


def fail(message: str) -> None:
    """Tell the parent, or the person who probes."""
    if sys.argv[1] == "probe":
        sys.exit(message)
    socket.socket(fileno=int(sys.argv[1])).send(f"error: {message}".encode())
    sys.exit(1)


def close_all_but(wanted: set[int]) -> None:
    """Whatever the parent's way of starting processes let through (uvloop's closes nothing) ends here."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - pathlib costs 10 ms of start
        if int(name) not in wanted:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(int(name))


def enter_namespaces(new_user: bool) -> None:
    """Unshare the network (and the user ids). Dies with the thread that started us, even before bwrap."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        os.setgroups([])
    if libc.unshare(CLONE_NEWNET | (CLONE_NEWUSER if new_user else 0)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "unshare user and network namespaces")
    if new_user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - pathlib costs 10 ms of start
                file.write(text)


def make_every_address_local() -> None:
    """`ip link set lo up; ip route add local default dev lo` for both families, without the `ip` binary."""
    lo = socket.if_nametoindex("lo")
    # struct ifinfomsg: family, type, index, flags = IFF_UP, change mask
    rtnetlink(RTM_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, lo, 1, 1))
    for family in (socket.AF_INET, socket.AF_INET6):
        # struct rtmsg: destination length 0, table 255 (local), protocol boot, scope host, type local;
        # then one attribute, RTA_OIF (4)
        route = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 255, 3, 254, 2, 0) + struct.pack("=HHi", 8, 4, lo)
        try:
            rtnetlink(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, route)
        except OSError:
            if family == socket.AF_INET or ipv6_listens():
                raise


def rtnetlink(kind: int, flags: int, body: bytes) -> None:
    """Send one rtnetlink(7) request and raise OSError when the kernel refuses it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.send(struct.pack("=IHHII", 16 + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body)
        (error,) = struct.unpack_from("=i", link.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error), "set up lo (CAP_NET_ADMIN withheld?)")


def ipv6_listens() -> bool:
    """Whether this kernel has IPv6 at all."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def open_listeners() -> list[socket.socket]:
    """TCP 443, TCP 80 (dual stack), UDP 53 on IPv4 and, where there is IPv6, on IPv6."""
    ipv6 = ipv6_listens()
    listeners = []
    for port in (443, 80):
        tcp = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_STREAM)
        if ipv6:
            tcp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        tcp.bind(("", port))
        tcp.listen(BACKLOG)
        listeners.append(tcp)
    # PKTINFO tells the server which address was asked, and lets it answer from that address.
    udp4 = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp4.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    udp4.bind(("", 53))
    listeners.append(udp4)
    if ipv6:
        udp6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        udp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        udp6.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        udp6.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)  # IPv6 sends from interface addresses only
        udp6.bind(("", 53))
        listeners.append(udp6)
    return listeners


def set_limits(text: str) -> None:
    """Lower limits given as `RLIMIT_NAME=value,...`; a limit that is already lower stays."""
    for name, _, value in (item.partition("=") for item in text.split(",") if item):
        which = getattr(resource, name)
        _, hard = resource.getrlimit(which)
        bound = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        resource.setrlimit(which, (bound, bound))


if __name__ == "__main__":
    main()
