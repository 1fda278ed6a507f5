"""The system call filter: as the kernel runs it, and, for the other architecture, as bpf(4) defines it."""

from __future__ import annotations

import errno
import platform
import struct

import pytest

from polar_mitm.errors import SetupError
from polar_mitm_sandbox import seccomp
from tests.sandbox.users import User

ALLOW, KILL = 0x7FFF0000, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NUMBERS = {
    "x86_64": {
        "socket": 41,
        "socketpair": 53,
        "clone": 56,
        "unshare": 272,
        "read": 0,
        "bpf": 321,
        "keyctl": 250,
    },
    "aarch64": {
        "socket": 198,
        "socketpair": 199,
        "clone": 220,
        "unshare": 97,
        "read": 63,
        "bpf": 280,
        "keyctl": 219,
    },
}


def verdict(machine: str, number: int, first: int = 0, audit: int | None = None) -> int:
    """Run the program on one call, as the kernel would."""
    program = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
    data = struct.pack("<IIQQ", number, audit or AUDIT[machine], 0, first)
    accumulator, at = 0, 0
    while True:
        code, jump_true, jump_false, k = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x06:
            return k
        else:
            taken = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += jump_true if taken else jump_false


def refused(code: int) -> int:
    return 0x00050000 | code


@pytest.mark.parametrize("machine", sorted(AUDIT))
def test_program(machine: str) -> None:
    number = NUMBERS[machine]
    assert verdict(machine, number["read"]) == ALLOW
    for call in ("socket", "socketpair"):
        for family in range(64):
            wanted = ALLOW if family in (1, 2, 10, 16) else refused(errno.EAFNOSUPPORT)
            assert verdict(machine, number[call], family) == wanted
            assert verdict(machine, number[call], family | 1 << 32) == wanted  # the kernel reads an int
    for call in ("clone", "unshare"):
        assert verdict(machine, number[call], 0x10000000 | 17) == refused(errno.EPERM)
        assert verdict(machine, number[call], 17) == ALLOW
    for missing in (425, 426, 427, 435):
        assert verdict(machine, missing) == refused(errno.ENOSYS)
    for call in ("bpf", "keyctl"):
        assert verdict(machine, number[call]) == refused(errno.EPERM)
    other = next(name for name in AUDIT if name != machine)
    assert verdict(machine, number["read"], audit=AUDIT[other]) == KILL
    assert verdict(machine, number["read"], audit=0x40000003) == KILL  # 32-bit x86 has other numbers


def test_x32_is_killed() -> None:
    assert verdict("x86_64", 0x40000000 | 41, 40) == KILL


def test_a_machine_without_a_table() -> None:
    with pytest.raises(SetupError, match="riscv64"):
        seccomp.program("riscv64")


def test_in_the_kernel(user: User) -> None:
    table = NUMBERS[platform.machine()]
    code = f"""
import ctypes, errno, json
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(number, *(ctypes.c_long(a) for a in args))
    return "made" if result >= 0 else errno.errorcode[ctypes.get_errno()]
print(json.dumps([
    call(425, 8, 0), call(426, 0), call(427, 0), call(435, 0, 0),
    call({table["bpf"]}, 0, 0, 0), call({table["keyctl"]}, 0, 0),
    call({table["unshare"]}, 0x10000000), call({table["socket"]}, 40, 1, 0), call({table["socket"]}, 2, 1, 0),
]))
"""
    assert user.python(code).json() == [
        *["ENOSYS"] * 4, "EPERM", "EPERM", "EPERM", "EAFNOSUPPORT", "made",
    ]  # fmt: skip


def test_threads_and_processes_still_work(user: User) -> None:
    """libc falls back to clone where clone3 is missing."""
    code = """
import json, subprocess, threading
out = []
thread = threading.Thread(target=lambda: out.append(1)); thread.start(); thread.join()
out.append(subprocess.run(["sh", "-c", "exit 3"]).returncode)
print(json.dumps(out))
"""
    assert user.python(code).json() == [1, 3]
