"""The system calls a harness may not make, as a classic BPF program for `bwrap --seccomp`.

A network namespace confines IP, and nothing else: AF_VSOCK reaches the hypervisor, AF_ALG and friends reach
kernel code, and io_uring opens sockets without a system call that a filter could see. So: sockets only of
four families, no io_uring, and none of the calls that no coding agent needs and kernel exploits love. User
namespaces are refused here too, for versions of bwrap that cannot disable them.

See seccomp(2) for the program's rules and bpf(4) for its instructions. x86_64 and aarch64.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
from dataclasses import dataclass

from polar_mitm.errors import SetupError

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# Offsets in struct seccomp_data; both architectures are little-endian, so an argument's low word comes first.
_NUMBER, _ARCH, _ARG0 = 0, 4, 16

_CLONE_NEWUSER = 0x10000000
_X32_BIT = 0x40000000
ALLOWED_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)


@dataclass(frozen=True)
class _Machine:
    """`audit` is the AUDIT_ARCH_ value; the rest are system call numbers."""

    audit: int
    sockets: tuple[int, ...]  # socket, socketpair
    namespaces: tuple[int, ...]  # clone, unshare
    # bpf, perf_event_open, userfaultfd, kexec_load, kexec_file_load, add_key, request_key, keyctl
    forbidden: tuple[int, ...]


_MACHINES = {
    "x86_64": _Machine(0xC000003E, (41, 53), (56, 272), (321, 298, 323, 246, 320, 248, 249, 250)),
    "aarch64": _Machine(0xC00000B7, (198, 199), (220, 97), (280, 241, 282, 104, 294, 217, 218, 219)),
}
# io_uring_setup, io_uring_enter, io_uring_register, and clone3, which keeps its flags in memory, where a
# filter cannot look; where it seems not to exist, libc uses clone. Their numbers are the same everywhere.
_MISSING = (425, 426, 427, 435)


def program(machine: str | None = None) -> bytes:
    """The filter for `machine` (default: this one), as an array of `struct sock_filter`.

    Raises:
        SetupError: for a machine that has no table here.
    """
    name = machine or platform.machine()
    if name not in _MACHINES:
        raise SetupError(f"no system call filter for {name}: the sandbox runs on {' and '.join(_MACHINES)}")
    table = _MACHINES[name]
    out = [_op(_LOAD, _ARCH), _op(_JUMP_EQ, table.audit, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NUMBER)]
    if name == "x86_64":  # the x32 calling convention has its own numbers for the same calls
        out += [_op(_JUMP_GE, _X32_BIT, 0, 1), _op(_RETURN, _KILL)]
    # Each body returns on every path: after it the accumulator may no longer hold the call's number.
    for numbers, body in (
        (table.sockets, _known_family()),
        (table.namespaces, _no_user_namespace()),
        (_MISSING, [_op(_RETURN, _ERRNO | errno.ENOSYS)]),
        (table.forbidden, [_op(_RETURN, _ERRNO | errno.EPERM)]),
    ):
        for number in numbers:
            out += [_op(_JUMP_EQ, number, 0, len(body)), *body]
    return b"".join([*out, _op(_RETURN, _ALLOW)])


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, k)


def _known_family() -> list[bytes]:
    count = len(ALLOWED_FAMILIES)
    checks = [_op(_JUMP_EQ, family, count - i, 0) for i, family in enumerate(ALLOWED_FAMILIES)]
    return [_op(_LOAD, _ARG0), *checks, _op(_RETURN, _ERRNO | errno.EAFNOSUPPORT), _op(_RETURN, _ALLOW)]


def _no_user_namespace() -> list[bytes]:
    return [
        _op(_LOAD, _ARG0),
        _op(_JUMP_SET, _CLONE_NEWUSER, 0, 1),
        _op(_RETURN, _ERRNO | errno.EPERM),
        _op(_RETURN, _ALLOW),
    ]
