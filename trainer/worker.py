"""The learner as a process of its own, so that who runs rollouts never loads torch, and outlives its crash.

    polar-mitm rl --Worker--> socket in a private folder --> python -m polar_mitm_trainer.worker: Learner

One command at a time, pickled; the socket's folder is this user's alone, and a key in it has to be known.
With more than one process (`torchrun`) every rank has a socket, and all are told the same.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from polar_mitm.errors import SetupError
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.samples import Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from polar_mitm_trainer.distributed import Distributed
    from polar_mitm_trainer.learner import Learner

_NUM_LINES = 15
_POLL_S = 0.05
_PATIENCE_S = 30.0


class WorkerLost(SetupError):
    """The learner's process has ended; what it saved last is where it was."""


class Refused(SetupError):
    """The learner did not do what it was told, and is as it was before."""


class Worker:
    """A learner in another process. Its methods block, one at a time whatever the thread.

    Args:
        config: what the learner is made of.
        log: what it prints goes to this file.
        num_processes: more than one are started with `torchrun`.

    Raises:
        SetupError: it does not start: no torch, no such model; the message says which.
        WorkerLost, Refused: from any method.
    """

    def __init__(self, config: TrainConfig, log: Path, *, num_processes: int = 1) -> None:
        self._log = log
        self._one = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="polar-mitm-worker-")
        key = secrets.token_bytes(32)
        (Path(self._folder.name) / "key").write_bytes(key)
        module = ["-m", "polar_mitm_trainer.worker", self._folder.name, config.policy.device]
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, *(many if num_processes > 1 else []), *module],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for whoever has the terminal, who then tells it
            )
        try:
            self._ranks = [self._connect(key, rank) for rank in range(num_processes)]
            self._ask("start", config)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the process, or of the `torchrun` above it."""
        return self._process.pid

    def step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One step on these samples, weighed; its metrics."""
        return dict(self._ask("step", list(samples)))

    def logprobs(self, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
        """Logprobs [T] in nats of each sample under the weights as they are."""
        return list(self._ask("logprobs", list(samples)))

    def export(self, folder: Path, *, adapter: bool = False) -> None:
        """Write the weights, or the adapter alone, as a Hugging Face or peft folder for an engine."""
        self._ask("export", folder, adapter)

    def share(self) -> list[dict[str, Any]]:
        """The weights in GPU memory, for `EngineWeights.transfer`; they stay there until the next step."""
        return list(self._ask("share"))

    def save(self, folder: Path, position: dict[str, Any], keep_last: int) -> None:
        """Write a checkpoint, whole or not at all; then remove all but the last ones beside it."""
        self._ask("save", folder, position, keep_last)

    def resume(self, checkpoints: Path) -> dict[str, Any] | None:
        """Take up the last whole checkpoint in a folder; the position saved with it, None without one."""
        found: dict[str, Any] | None = self._ask("resume", checkpoints)
        return found

    def version(self) -> int:
        """How many optimiser steps the weights have behind them."""
        return int(self._ask("version"))

    def stop(self) -> None:
        """End it in good order; by force where it does not."""
        with contextlib.suppress(SetupError, OSError):
            self._ask("stop")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)
        self.kill()

    def kill(self) -> None:
        """End it by force."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _connect(self, key: bytes, rank: int) -> Connection:
        with _address(Path(self._folder.name), rank) as address:
            while True:
                if self._process.poll() is not None:
                    raise self._lost("did not start")
                try:
                    return Client(address, "AF_UNIX", authkey=key)
                except (FileNotFoundError, ConnectionRefusedError):
                    time.sleep(_POLL_S)
                except (EOFError, OSError):
                    raise self._lost("did not start") from None

    def _ask(self, command: str, *arguments: Any) -> Any:
        with self._one:
            try:
                for rank in self._ranks:
                    rank.send((command, arguments))
                answers = [rank.recv() for rank in self._ranks]
            except (EOFError, OSError) as error:
                raise self._lost("ended") from error
        for done, answer in answers:
            if not done:
                raise Refused(answer)
        return answers[0][1]

    def _lost(self, how: str) -> WorkerLost:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)
        code = self._process.poll()
        by = f" (signal {-code})" if code is not None and code < 0 else ""
        return WorkerLost(f"the learner's process {how}{by}; {self._log} ends with:\n{tail(self._log)}")


def tail(log: Path) -> str:
    """The last lines of a log."""
    with log.open(errors="replace") as lines:
        return "".join(deque(lines, _NUM_LINES)).rstrip() or "(nothing)"


class _Server:
    """What a command does to the learner."""

    learner: Learner

    def __init__(self, distributed: Distributed) -> None:
        self._distributed = distributed

    def start(self, config: TrainConfig) -> None:
        from polar_mitm_trainer.learner import Learner

        self.learner = Learner(config, distributed=self._distributed)

    def step(self, samples: list[Sample]) -> dict[str, float]:
        return self.learner.step(samples)

    def logprobs(self, samples: list[Sample]) -> list[NDArray[np.float32]]:
        return self.learner.logprobs(samples)

    def export(self, folder: Path, adapter: bool) -> None:
        (self.learner.export_adapter if adapter else self.learner.export)(folder)

    def share(self) -> list[dict[str, Any]]:
        from polar_mitm_trainer.transfer import shared

        self._shared = list(shared(self.learner.policy.model.state_dict().items()))
        return [info for info, _ in self._shared]

    def save(self, folder: Path, position: dict[str, Any], keep_last: int) -> None:
        from polar_mitm_trainer.checkpoint import prune

        self.learner.save(folder, position)
        if self._distributed.rank == 0:
            prune(folder.parent, keep_last)

    def resume(self, checkpoints: Path) -> dict[str, Any] | None:
        from polar_mitm_trainer.checkpoint import latest

        found = latest(checkpoints)
        return self.learner.resume(found) if found else None

    def version(self) -> int:
        return self.learner.version


@contextlib.contextmanager
def _address(folder: Path, rank: int) -> Iterator[str]:
    """Of a rank's socket: by descriptor, as the path below a long `TMPDIR` passes the 108 bytes of one."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/rank-{rank}"
    finally:
        os.close(descriptor)


def main(folder: Path, device: str) -> None:
    """Do what comes over this rank's socket until it is stopped, or nobody is there any more."""
    from transformers.utils.logging import disable_progress_bar

    from polar_mitm_trainer.distributed import Distributed

    disable_progress_bar()
    distributed = Distributed.from_environment(device)
    key = (folder / "key").read_bytes()
    with _address(folder, distributed.rank) as address, Listener(address, "AF_UNIX", authkey=key) as listener:
        connection = listener.accept()
    server = _Server(distributed)
    with connection, contextlib.suppress(EOFError, OSError):
        while True:
            command, arguments = connection.recv()
            try:
                answer = True, getattr(server, command)(*arguments) if command != "stop" else None
            except Exception as error:
                traceback.print_exc()
                answer = False, f"{error}" if isinstance(error, SetupError | ValueError) else repr(error)
            connection.send(answer)
            if command == "stop":
                break
    distributed.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
