"""Who the harness is. Never root: not inside, and above all not outside.

A process with the host's uid 0 but no capability still owns every root-owned kernel file it can see: it may
write /proc/sys/kernel/core_pattern, or chmod the host's /dev/null. So

- without root the harness is the caller, shown as an ordinary uid of a user namespace;
- root's harness is whoever owns the workspace, without a user namespace (`sudo polar-mitm run` in a home);
- root's own workspace is lent to a uid that nobody has, and given back (`Loan`).

Either way the files that the harness leaves belong to the workspace's owner.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from polar_mitm.errors import SetupError
from polar_mitm_sandbox.spec import SANDBOX_UID, WORKSPACE

HELPER = Path(__file__).with_name("helper.py")
# Above what directories (LDAP, Active Directory) and systemd hand out: https://systemd.io/UIDS-GIDS
LENT_UIDS = range(2_100_000_000, 2_100_065_536)


@dataclass(frozen=True)
class Identity:
    """Ids as seen inside. With `user_namespace` they stand for the caller's, else for themselves."""

    uid: int
    gid: int
    user_namespace: bool

    @property
    def lent(self) -> bool:
        """Whether the workspace has to be lent to this user."""
        return self.uid in LENT_UIDS

    @property
    def counted_alone(self) -> bool:
        """Whether the kernel counts this sandbox's processes apart from the user's others."""
        release = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
        return self.lent or (self.user_namespace and release >= (5, 14))

    def become(self) -> list[str]:
        """Command prefix that becomes this user, in the workspace, where no user namespace maps ids.

        Only then may it enter: the workspace can be closed to everybody else.
        """
        if self.user_namespace:
            return []
        return [
            "setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "--inh-caps=-all",
            "--ambient-caps=-all", "--bounding-set=-all", "--",
            "/bin/sh", "-c", f'cd {WORKSPACE} && unset OLDPWD && exec "$@"', "sh",
        ]  # fmt: skip


def choose(workdir: Path) -> Identity:
    """The identity of a harness that is to work in `workdir`."""
    if not is_host_root():
        return Identity(SANDBOX_UID, SANDBOX_UID, user_namespace=True)
    owner = workdir.stat()
    if owner.st_uid != 0 and owner.st_uid not in LENT_UIDS:
        return Identity(owner.st_uid, owner.st_gid, user_namespace=False)
    uid = LENT_UIDS.start + secrets.randbelow(len(LENT_UIDS))
    return Identity(uid, uid, user_namespace=False)


def is_host_root() -> bool:
    """Whether our uid 0 is the machine's, which owns the kernel's files, or only a user namespace's."""
    return os.geteuid() == 0 and Path("/proc/sys/kernel/core_pattern").stat().st_uid == 0


def probe(new_user: bool) -> str | None:
    """Run the helper with nobody to talk to: it makes its network and exits. None when that worked."""
    command = [sys.executable, "-ISB", str(HELPER), "probe", str(int(new_user))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


class Loan:
    """Root's files in a workspace belong to `uid` until `end`. Takes time in proportion to their number.

    A loan that was never ended (a killed process) is taken over by the next one.

    Raises:
        SetupError: another sandbox is working in `workdir`, or its files cannot change owners.
    """

    def __init__(self, workdir: Path, uid: int) -> None:
        self._workdir, self._uid = workdir, uid
        self._lock = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            change_owner(workdir, lambda owner: owner == 0 or owner in LENT_UIDS, uid)
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                raise SetupError(f"another sandbox is working in {workdir}: give each its own") from None
            if isinstance(error, OSError):
                raise SetupError(f"root cannot lend {workdir} to the sandbox's user ({error})") from error
            raise

    def end(self) -> None:
        """Give back. The kernel clears set-user-id bits as it does so."""
        change_owner(self._workdir, lambda owner: owner == self._uid, 0)
        os.close(self._lock)


def change_owner(root: Path, old: Callable[[int], bool], new: int) -> None:
    """Give what users and groups that are `old` own, at and below `root`, to `new`. Follows no links."""
    for directory, below, files in os.walk(root):
        for path in (directory, *(f"{directory}/{name}" for name in (*below, *files))):
            owner = os.lstat(path)
            uid, gid = (new if old(each) else -1 for each in (owner.st_uid, owner.st_gid))
            if (uid, gid) != (-1, -1):
                os.chown(path, uid, gid, follow_symlinks=False)
