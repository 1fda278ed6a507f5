"""What a sandbox sees of the file system: an allow-list, given to bubblewrap as arguments.

    /usr /bin /lib* /etc /opt /nix   read-only; without what /etc has of credentials
    /workspace                       the task's directory, the only writable thing that outlives the sandbox
    /home/agent /tmp /dev/shm        in memory
    /etc/{passwd,hosts,resolv.conf,...}, certificates: our own
    whatever else the program needs  read-only, at its own place

Everything else (home directories, /var, /srv, sockets in /run, the store, the CA's key) is not there.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

from polar_mitm.errors import SetupError
from polar_mitm_sandbox import seccomp, trust
from polar_mitm_sandbox.executables import SYSTEM_DIRS, is_system
from polar_mitm_sandbox.identity import Identity
from polar_mitm_sandbox.spec import HOME, WORKSPACE, SandboxSpec

# Any address would do, since all are local; this one is reserved for documentation (RFC 5737).
NAMESERVER = "192.0.2.53"
# Closed to everybody but root on most machines; world-readable on some, and yet somebody's credentials or a
# harness's managed configuration.
_PRIVATE_ETC = (
    "claude-code", "codex", "docker", "environment", "gshadow", "gshadow-", "kubernetes", "npmrc", "pip.conf",
    "rancher", "shadow", "shadow-", "ssh", "ssl/private", "sudoers", "sudoers.d", "uv", "wireguard",
)  # fmt: skip


class View:
    """Collects bubblewrap's options and the descriptors they name. `close` these after the start."""

    def __init__(self) -> None:
        self.args: list[str] = []
        self.fds: list[int] = []
        self.shown: list[Path] = []
        self._made = {Path("/")}

    def add(self, *args: str | Path) -> None:
        self.args += map(str, args)

    def data(self, content: bytes) -> str:
        """A descriptor that bubblewrap reads `content` from."""
        fd = os.memfd_create("polar-mitm")
        self.fds.append(fd)
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        return str(fd)

    def parents(self, path: Path, mode: str = "0755") -> None:
        """Make the directories above `path`; those that bubblewrap makes unasked are for their owner only."""
        for parent in reversed(path.parents):
            if parent not in self._made:
                self._made.add(parent)
                self.add("--perms", mode, "--dir", parent)

    def read_only(self, path: Path) -> None:
        self.shown.append(path)
        self.parents(path)
        self.add("--ro-bind", path, path)

    def replace(self, path: str, content: bytes) -> None:
        """Our own `content` in place of a host file; links are followed, as a mount cannot replace one."""
        real = Path(os.path.realpath(path))
        if real.exists() or not is_system(real):
            self.add("--perms", "0644", "--ro-bind-data", self.data(content), real)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


def build(spec: SandboxSpec, who: Identity, env: dict[str, str], shown: list[Path], bwrap: str) -> View:
    """All of bubblewrap's options for `spec`, whose `workdir` is a real path.

    Args:
        env: the harness's whole environment.
        shown: host paths to show besides `spec.read_only`.

    Raises:
        SetupError: a path is missing, or a mount would show something of `spec.never_visible`.
    """
    view = View()
    try:
        _namespaces(view, who, bwrap)
        _system(view)
        _scratch(view, spec, who, bwrap)
        _etc(view, spec, who)
        _shown(view, [*shown, *spec.read_only])
        _workspace(view, spec, who)
        for name, value in env.items():
            view.add("--setenv", name, value)
        _refuse_private(view.shown, spec)
    except BaseException:
        view.close()
        raise
    return view


def _namespaces(view: View, who: Identity, bwrap: str) -> None:
    view.add("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    view.add("--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
    if who.user_namespace:
        view.add("--unshare-user", "--uid", str(who.uid), "--gid", str(who.gid))
        if "--disable-userns" in features(bwrap):
            view.add("--disable-userns")
    else:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            view.add("--cap-add", capability)
    view.add("--seccomp", view.data(seccomp.program()))


def _system(view: View) -> None:
    for path in SYSTEM_DIRS:
        if path.is_symlink():
            view.add("--symlink", path.readlink(), path)
        elif path.is_dir():
            view.read_only(path)
    for private in (Path("/etc", name) for name in _PRIVATE_ETC):
        if private.exists() and not private.is_symlink():
            view.add(*(("--tmpfs", private) if private.is_dir() else ("--ro-bind", "/dev/null", private)))
    if Path("/opt").is_dir():
        view.read_only(Path("/opt"))


def _scratch(view: View, spec: SandboxSpec, who: Identity, bwrap: str) -> None:
    size: list[str] = []
    if spec.limits.scratch_bytes is not None and "--size" in features(bwrap):
        size = ["--size", str(spec.limits.scratch_bytes)]
    view.add("--proc", "/proc", "--dev", "/dev")
    view.add("--perms", "1777", *size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev")
    view.add("--perms", "1777", *size, "--tmpfs", "/tmp")
    view.parents(Path("/var/tmp"))
    view.add("--tmpfs", "/run", "--symlink", "/run", "/var/run", "--symlink", "/tmp", "/var/tmp")
    # Without a user namespace root makes the directory, for somebody else.
    mode = "0755" if who.user_namespace else "0777"
    view.parents(Path(HOME))
    view.add("--perms", mode, *size, "--tmpfs", HOME)
    for path, text in ((Path(HOME, name), text) for name, text in spec.home.items()):
        view.parents(path, mode)
        view.add("--perms", "0666", "--file", view.data(text.encode()), path)


def _etc(view: View, spec: SandboxSpec, who: Identity) -> None:
    users = f"root:x:0:0::/root:/bin/sh\nagent:x:{who.uid}:{who.gid}::{HOME}:/bin/bash\n"
    for name, text in {
        "/etc/passwd": users + "nobody:x:65534:65534::/:/bin/false\n",
        "/etc/group": f"root:x:0:\nagent:x:{who.gid}:\nnogroup:x:65534:\n",
        "/etc/hostname": "sandbox\n",
        "/etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost sandbox\n",
        "/etc/resolv.conf": f"nameserver {NAMESERVER}\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }.items():
        view.replace(name, text.encode())
    if spec.trust is None or trust.SYSTEM in spec.trust:
        _system_store(view, spec.ca_pem)
    view.parents(Path(trust.CA_PATH))
    for name, pem in ((trust.CA_PATH, spec.ca_pem), (trust.BUNDLE_PATH, trust.bundle(spec.ca_pem))):
        view.add("--perms", "0644", "--file", view.data(pem), name)


def _system_store(view: View, ca_pem: bytes) -> None:
    directory, content, outside = trust.system_files(ca_pem)
    if directory is not None:
        view.add("--tmpfs", directory)
        for name, pem in content.items():
            view.add("--perms", "0644", "--file", view.data(pem), Path(directory, name))
        view.add("--remount-ro", directory)
    for name, pem in outside.items():
        view.replace(name, pem)


def _shown(view: View, paths: list[Path]) -> None:
    # Parents first: a mount hides what was mounted below it before.
    for path in sorted(set(paths)):
        if not path.exists():
            raise SetupError(f"{path} does not exist, so the sandbox cannot show it")
        if path.is_relative_to(WORKSPACE):
            raise SetupError(f"{path} cannot be shown: inside a sandbox {WORKSPACE} is the task's directory")
        if not is_system(path) and not any(path.is_relative_to(already) for already in view.shown):
            view.read_only(path)


def _workspace(view: View, spec: SandboxSpec, who: Identity) -> None:
    if Path.home().resolve().is_relative_to(spec.workdir):
        raise SetupError(f"{spec.workdir} holds your home directory: give the task a directory of its own")
    view.shown.append(spec.workdir)
    view.add("--bind", spec.workdir, WORKSPACE, "--remount-ro", "/run", "--remount-ro", "/")
    if who.user_namespace:
        view.add("--chdir", WORKSPACE)


def _refuse_private(shown: list[Path], spec: SandboxSpec) -> None:
    for private in (path.resolve() for path in spec.never_visible):
        for path in shown:
            if private.is_relative_to(path.resolve()):
                raise SetupError(f"{private} would be visible in the sandbox, below {path}: move one of them")


@functools.cache
def features(bwrap: str) -> frozenset[str]:
    """The options that this version of bubblewrap knows."""
    text = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False).stdout
    return frozenset(word for word in text.split() if word.startswith("--"))
