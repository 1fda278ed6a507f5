"""One rollout, start to end: a harness in a sandbox, its traffic to a host. Shared by `run` and `demo`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from polar_mitm.cli.exits import TIMEOUT
from polar_mitm.cli.hosting import Host
from polar_mitm.dialects.ids import new_id
from polar_mitm.types import Rollout, RolloutStatus

if TYPE_CHECKING:
    from polar_mitm_sandbox import SandboxSpec


@dataclass
class Outcome:
    """What `run` tells: the harness's own exit code, 124 after a deadline, and what the interceptor saw."""

    rollout_id: str
    name: str
    version: str
    exit_code: int
    status: str
    calls: int
    sampled_tokens: int
    refused: list[str]
    incomplete: str | None
    seconds: float
    store: Path | None
    """The database that it went to; None where another interceptor keeps it."""
    engine_failure: str | None = None
    """Why the engine did not answer its last call, where it did not."""


@dataclass
class Job:
    """A harness (or any command) to run on a task directory."""

    command: Sequence[str]
    workdir: Path = Path()
    name: str = ""
    version: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    home: Mapping[str, str] = field(default_factory=dict)
    read_only: Sequence[Path] = ()
    path: Sequence[str] = ()
    hosts: Mapping[str, str] = field(default_factory=dict)
    """Where it calls models, name -> provider, for an interceptor that is made for it."""
    trust: Sequence[str] | None = None
    """The only ways in which it comes to trust the interceptor's CA; all by default (`SandboxSpec`)."""
    timeout_s: float | None = None
    never_visible: Sequence[Path] = ()
    group_id: str | None = None
    task_id: str | None = None
    sample_index: int = 0
    forked_from: str | None = None
    stdin: int | None = None
    """Descriptor that the command reads from; /dev/null by default."""
    stdout: int | None = None
    stderr: int | None = None
    """Descriptors that the command writes to; its runner's own by default."""


def rollout_of(job: Job) -> Rollout:
    """The record of a rollout that is to begin."""
    return Rollout(
        new_id(),
        group_id=job.group_id,
        task_id=job.task_id,
        sample_index=job.sample_index,
        forked_from=job.forked_from,
        harness=job.name,
        harness_version=job.version,
        command=list(job.command),
    )


async def run_rollout(job: Job, host: Host, rollout: Rollout | None = None) -> Outcome:
    """Run `job` in a sandbox whose only way out is `host`; the rollout is recorded whatever happens.

    Args:
        rollout: its record, `rollout_of(job)` by default, for who wants to look at it afterwards.

    Raises:
        SetupError: the sandbox cannot be made; nothing was run.
    """
    from polar_mitm_sandbox import NamespaceSandbox

    rollout = rollout or rollout_of(job)
    sandbox = NamespaceSandbox()
    ending: tuple[RolloutStatus, str] = ("failed", "the sandbox did not start")
    begun_at = time.monotonic()
    try:
        await sandbox.start(_spec(job, host), lambda sockets: host.open(rollout, sockets))
        rollout.exit_code = await sandbox.wait()
        ending = _verdict(rollout.exit_code, sandbox.timed_out)
    except asyncio.CancelledError:
        ending = ("interrupted", "the runner was interrupted")
        raise
    finally:
        await sandbox.stop()
        rollout.status, rollout.stop_reason = ending
        served = await host.close(rollout)
    return Outcome(
        rollout_id=rollout.rollout_id,
        name=job.name,
        version=job.version,
        exit_code=TIMEOUT if sandbox.timed_out else rollout.exit_code,
        status=rollout.status,
        calls=served.num_calls,
        sampled_tokens=served.num_sampled_tokens,
        refused=sorted(served.refused),
        incomplete=served.incomplete,
        seconds=round(time.monotonic() - begun_at, 2),
        store=host.store,
        engine_failure=served.engine_failure,
    )


def _verdict(exit_code: int, timed_out: bool) -> tuple[RolloutStatus, str]:
    if timed_out:
        return "timeout", "the deadline passed"
    return ("completed", "exit 0") if exit_code == 0 else ("failed", f"exit {exit_code}")


def _spec(job: Job, host: Host) -> SandboxSpec:
    from polar_mitm_sandbox import SandboxSpec

    return SandboxSpec(
        command=job.command,
        workdir=job.workdir,
        ca_pem=host.ca_pem,
        env=job.env,
        home=job.home,
        read_only=job.read_only,
        path=job.path,
        never_visible=job.never_visible,
        stdin=job.stdin,
        stdout=job.stdout,
        stderr=job.stderr,
        trust=job.trust,
        timeout_s=job.timeout_s,
    )
