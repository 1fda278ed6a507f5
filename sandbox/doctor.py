"""What this machine lacks for sandboxes, found by trying, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from polar_mitm.cache import default_cache
from polar_mitm.errors import SetupError
from polar_mitm_sandbox import identity, install, recipes, seccomp


@dataclass(frozen=True)
class Check:
    """One finding. `fix` says what to do when `ok` is false; without a `required` one no sandbox starts."""

    name: str
    ok: bool
    detail: str = ""
    fix: str = ""
    required: bool = True


# Kernel switches that withhold user namespaces from ordinary users, with the value that does so.
_SWITCHES = {
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "kernel/unprivileged_userns_clone": ("0", "1"),
    "user/max_user_namespaces": ("0", "15000"),
    "user/max_net_namespaces": ("0", "15000"),
}


def doctor(cache: Path | None = None) -> list[Check]:
    """All checks, the required ones first. `cache` is where harnesses are looked for."""
    root = identity.is_host_root()
    checks = [_platform(), _program("bwrap", "bubblewrap")]
    if root:
        checks.append(_program("setpriv", "util-linux"))
    checks.append(_namespaces(root))
    if all(check.ok for check in checks):
        checks.append(_sandbox(root))
    return [*checks, _npm(), *_harnesses(cache or default_cache())]


def _platform() -> Check:
    detail = f"{platform.system()} {os.uname().release} on {platform.machine()}"
    try:
        seccomp.program()
    except SetupError as error:
        return Check("platform", False, detail, str(error))
    return Check("platform", platform.system() == "Linux", detail, "sandboxes need Linux")


def _program(name: str, package: str) -> Check:
    found = shutil.which(name)
    return Check(
        name, found is not None, found or "not on PATH", f"apt-get install {package} (or dnf, apk, pacman)"
    )


def _namespaces(root: bool) -> Check:
    """Network namespace, in a user namespace unless we are root, by the helper that every sandbox uses."""
    error = identity.probe(new_user=not root)
    as_whom = "as root" if root else "as an ordinary user"
    return Check(f"network namespaces {as_whom}", error is None, error or "work", _namespace_fix(root))


def _namespace_fix(root: bool) -> str:
    if root:
        return (
            "this root lacks CAP_SYS_ADMIN: run as an ordinary user, or start the container with --privileged"
        )
    for name, (bad, good) in _SWITCHES.items():
        file = Path("/proc/sys", name)
        if file.exists() and file.read_text().strip() == bad:
            return f"sysctl -w {name.replace('/', '.')}={good}, or run as root"
    return "a container or security module withholds user namespaces: run as root, or relax it"


def _sandbox(root: bool) -> Check:
    """The whole chain once: helper, bubblewrap, a new /proc, the system call filter."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    filter_fd = os.memfd_create("polar-mitm")
    os.write(filter_fd, seccomp.program())
    os.lseek(filter_fd, 0, os.SEEK_SET)
    bwrap = [shutil.which("bwrap") or "bwrap", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
    bwrap += ["--unshare-pid", *([] if root else ["--unshare-user"]), "--cap-drop", "ALL", "--seccomp"]
    with control, theirs:
        process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-ISB",
                    str(identity.HELPER),
                    str(theirs.fileno()),
                    str(int(not root)),
                    "",
                    str(filter_fd),
                    "--",
                ),
                *(*bwrap, str(filter_fd), "--", shutil.which("true") or "/bin/true"),
            ],
            pass_fds=(theirs.fileno(), filter_fd),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(filter_fd)
        control.send(b"go")
        _, error = process.communicate()
    fix = "in a container, allow a new /proc: docker run --security-opt systempaths=unconfined"
    return Check("sandbox", process.returncode == 0, error.strip() or "works", fix)


def _npm() -> Check:
    found = shutil.which("npm")
    fix = "harnesses bring a Node.js of our own then; node 22.19 or newer with npm saves 200 MB"
    return Check("npm", found is not None, found or "not on PATH", fix, required=False)


def _harnesses(cache: Path) -> list[Check]:
    checks = []
    for recipe in map(recipes.load, recipes.available()):
        present = install.is_installed(recipe, cache)
        detail = f"{recipe.version} {'in the cache' if present else 'not installed yet'}"
        checks.append(Check(recipe.name, present, detail, "installed on its first run", required=False))
    return checks
