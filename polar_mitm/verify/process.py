"""Scoring in another process, which may run on another Python: torch stays out of this one.

Both sides write 8-byte integers and arrays in the machine's own byte order. The process says how many ids its
model has once it is loaded. Then, again and again: T and ids [T] int64 go in; T and logprobs [T] float64 come
out, or minus the length of a message in UTF-8 and the message.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from polar_mitm.errors import SetupError
from polar_mitm.verify.score import Unscorable


class ProcessScorer:
    """A `Scorer` behind a command, such as `trainer/scorer.py`; an async context manager, which ends it.

    Raises:
        SetupError: on entry, where the command does not get ready; later, where it ends.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._command, self._env = command, env
        self._one = asyncio.Lock()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115

    async def __aenter__(self) -> ProcessScorer:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=self._log, env=self._env
        )
        try:
            await self._number()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()
        self._log.close()

    async def score(self, ids: NDArray[np.int32]) -> NDArray[np.float64]:
        """Logprobs [T]; NaN at the first.

        Raises:
            Unscorable: not these ids.
            SetupError: the process has ended.
        """
        assert self._process.stdin is not None
        async with self._one:
            self._process.stdin.write(np.int64(ids.size).tobytes() + ids.astype(np.int64).tobytes())
            size = await self._number()
            if size < 0:
                raise Unscorable((await self._read(-size)).decode())
            return np.frombuffer(await self._read(8 * size), dtype=np.float64)

    async def _number(self) -> int:
        return int.from_bytes(await self._read(8), sys.byteorder, signed=True)

    async def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        try:
            return await self._process.stdout.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            await self._process.wait()
            self._log.seek(0)
            said = self._log.read().decode("utf-8", "replace").strip().splitlines()
            why = said[-1] if said else f"exit code {self._process.returncode}"
            raise SetupError(f"scoring in torch failed: {why}") from error
