"""What a sandbox is to run, and within which bounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

HOME = "/home/agent"
WORKSPACE = "/workspace"
SANDBOX_UID = 1000


@dataclass(frozen=True)
class Limits:
    """Bounds on one sandbox. None means no bound of ours.

    `num_processes` counts threads too; it is RLIMIT_NPROC, and not set where that would count all of a
    user's (Linux before 5.14, and root working in somebody's directory). `file_bytes` bounds each file
    written, `scratch_bytes` each of /tmp, /dev/shm and HOME, which live in memory.
    """

    num_processes: int | None = 2048
    file_bytes: int | None = None
    scratch_bytes: int | None = 2 << 30


@dataclass(frozen=True)
class SandboxSpec:
    """One run of one command.

    Attributes:
        command: the program and its arguments. A bare name is looked up in `path`, then in the caller's PATH;
            what it needs to run (its install prefix, a script's interpreter) becomes visible, read-only.
        workdir: the directory that becomes /workspace, readable and writable, and the working directory.
        ca_pem: certificate (no key) of the CA that the interceptor signs with.
        env: variables for the command. Proxy and base URL variables are dropped: a harness must not be told.
        home: files for the sandbox's HOME, by relative path.
        read_only: further host paths to show, at the same place.
        path: directories to put before the standard PATH.
        never_visible: host paths (store, CA key, state) that no mount may contain; `start` refuses otherwise.
        stdin, stdout, stderr: as for `subprocess.Popen`; stdin None means /dev/null, the others inherit.
        trust: the only ways in which programs come to trust the CA, `system` or a variable of
            `trust.environment`; None for all. For finding out which one is enough.
        timeout_s: after that long, counted from `start`, everything is killed.
    """

    command: Sequence[str]
    workdir: Path
    ca_pem: bytes
    env: Mapping[str, str] = field(default_factory=dict)
    home: Mapping[str, str] = field(default_factory=dict)
    read_only: Sequence[Path] = ()
    path: Sequence[str] = ()
    never_visible: Sequence[Path] = ()
    stdin: int | IO[Any] | None = None
    stdout: int | IO[Any] | None = None
    stderr: int | IO[Any] | None = None
    trust: Collection[str] | None = None
    timeout_s: float | None = None
    limits: Limits = field(default_factory=Limits)
