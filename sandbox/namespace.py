"""The namespace sandbox: bubblewrap in a network namespace whose only way out are passed listeners."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator

from polar_mitm.errors import SetupError
from polar_mitm_sandbox import environment, executables, identity, view
from polar_mitm_sandbox.spec import Limits, SandboxSpec

OnListeners = Callable[[list[socket.socket]], Awaitable[None]]
_MAX_LISTENERS = 8
_BWRAP_FAILED = "bubblewrap could not make the sandbox: its message is on the command's standard error"


class NamespaceSandbox:
    """One sandbox, one run. `start`, then `wait`; `stop` at any time.

    Start it from a thread that outlives it (the event loop's): when that thread ends, so does the sandbox.

    Attributes:
        timed_out: whether `timeout_s` ended the run.
    """

    def __init__(self) -> None:
        self.timed_out = False
        self._process: asyncio.subprocess.Process | None = None
        self._init: int | None = None  # pidfd of the first process inside
        self._status: int | None = None  # where bubblewrap reports, as JSON lines
        self._told = ""  # what it has reported
        self._stopping = asyncio.Lock()
        self._loan: identity.Loan | None = None
        self._deadline: float | None = None

    async def start(self, spec: SandboxSpec, on_listeners: OnListeners) -> None:
        """Make the sandbox, give its listeners to `on_listeners`, then let the command run.

        `on_listeners` gets non-blocking sockets in this order: TCP 443, TCP 80, UDP 53 on IPv4 and, where the
        kernel has it, on IPv6. They are its own to close. The original destination of an accepted connection
        is its `getsockname()`, of a datagram its IP_PKTINFO or IPV6_PKTINFO. The command starts afterwards.

        Raises:
            SetupError: this machine, or `spec`, does not allow it; nothing is left running.
        """
        loop = asyncio.get_running_loop()
        self._deadline = None if spec.timeout_s is None else loop.time() + spec.timeout_s
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        status, status_theirs = os.pipe()
        self._status = status
        os.set_blocking(status, False)
        control.setblocking(False)
        try:
            with control:
                with theirs, _closing(status_theirs):
                    self._process = await self._spawn(spec, theirs.fileno(), status_theirs)
                await on_listeners(await self._receive(control))
                control.send(b"go")
                await self._meet_first_process()
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> int:
        """The command's exit code, 128 + signal when one killed it; 137 after `timeout_s` or `stop`.

        Raises:
            SetupError: bubblewrap failed before it ran the command.
        """
        process = self._started()
        try:
            async with asyncio.timeout_at(self._deadline):
                await process.wait()
        except TimeoutError:
            self.timed_out = True
        await self.stop()
        code = process.returncode
        assert code is not None
        # bubblewrap tells the exit code of a command that it ran, and nothing when it failed before.
        if code == 1 and "exit-code" not in self._told:
            raise SetupError(_BWRAP_FAILED)
        return code if code >= 0 else 128 - code

    async def stop(self) -> None:
        """Kill whatever runs in the sandbox, and return when all of it has died."""
        async with self._stopping:
            await self._kill()
            if self._status is not None:
                self._read_status()
                os.close(self._status)
                self._status = None
            if self._loan is not None:
                await asyncio.to_thread(self._loan.end)
                self._loan = None

    async def _kill(self) -> None:
        process, init, self._init = self._process, self._init, None
        if process is None:
            return
        if init is not None:
            with _closing(init), contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(init, signal.SIGKILL)
                # Readable once its process, which outlives all others of its pid namespace, has died.
                await _readable(init)
        elif process.returncode is None:
            # Still setting up: bubblewrap's processes are in one group until the command starts.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    def _started(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("the sandbox was not started")
        return self._process

    async def _spawn(self, spec: SandboxSpec, control: int, status: int) -> asyncio.subprocess.Process:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SetupError("bubblewrap is missing: `apt-get install bubblewrap`, `dnf install bubblewrap`")
        if not spec.workdir.is_dir():
            raise SetupError(f"{spec.workdir} is not a directory")
        spec = dataclasses.replace(spec, workdir=spec.workdir.resolve())
        search = os.pathsep.join([*spec.path, os.environ.get("PATH", os.defpath)])
        command = executables.resolve(spec.command[0], search)
        who = identity.choose(spec.workdir)
        env = environment.build(spec.env, [*spec.path, *command.path], spec.trust)
        options = view.build(spec, who, env, command.shown, bwrap)
        try:
            options.add("--json-status-fd", str(status))
            arguments = options.data("".join(f"{arg}\0" for arg in options.args).encode())
            if who.lent:
                self._loan = await asyncio.to_thread(identity.Loan, spec.workdir, who.uid)
            own_python = (sys.executable, "-ISB", str(identity.HELPER))
            fds = ",".join(map(str, (status, *options.fds)))
            limits = _rlimits(spec.limits, who)
            return await asyncio.create_subprocess_exec(
                *(*own_python, str(control), str(int(who.user_namespace)), limits, fds, "--"),
                *(bwrap, "--args", arguments, "--", *who.become()),
                *(command.program, *spec.command[1:]),
                pass_fds=(control, status, *options.fds),
                stdin=subprocess.DEVNULL if spec.stdin is None else spec.stdin,
                stdout=spec.stdout,
                stderr=spec.stderr,
                start_new_session=True,  # a Ctrl-C is for us, who then stop the sandbox in good order
            )
        finally:
            options.close()

    async def _receive(self, control: socket.socket) -> list[socket.socket]:
        await _readable(control.fileno())
        message, fds, _, _ = socket.recv_fds(control, 4096, _MAX_LISTENERS, socket.MSG_CMSG_CLOEXEC)
        listeners = [socket.socket(fileno=fd) for fd in fds]
        if message != b"listeners":
            reason = message.decode().removeprefix("error: ") or "the helper died"
            raise SetupError(f"cannot isolate the network ({reason}): see `polar-mitm doctor`")
        for listener in listeners:
            listener.setblocking(False)
        return listeners

    async def _meet_first_process(self) -> None:
        """Get hold of the sandbox's pid 1, whose death ends everything in it."""
        assert self._status is not None
        while "\n" not in self._told:
            await _readable(self._status)
            if not self._read_status():
                raise SetupError(_BWRAP_FAILED)
        with contextlib.suppress(ProcessLookupError):  # it may have come and gone
            self._init = os.pidfd_open(json.loads(self._told.splitlines()[0])["child-pid"])

    def _read_status(self) -> bool:
        """Take in what bubblewrap has reported since; False at the end of file."""
        assert self._status is not None
        with contextlib.suppress(BlockingIOError):
            text = os.read(self._status, 4096).decode()
            self._told += text
            return bool(text)
        return True


def _rlimits(limits: Limits, who: identity.Identity) -> str:
    num_processes = limits.num_processes if who.counted_alone else None
    wanted = {"RLIMIT_CORE": 0, "RLIMIT_NPROC": num_processes, "RLIMIT_FSIZE": limits.file_bytes}
    return ",".join(f"{name}={value}" for name, value in wanted.items() if value is not None)


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


async def _readable(fd: int) -> None:
    """Wait until there is something to read from `fd`, or its end."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
