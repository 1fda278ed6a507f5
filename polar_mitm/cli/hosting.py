"""Where a rollout's traffic goes: an interceptor in this process, or one that runs already."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from polar_mitm.cli.output import plural, progress, say
from polar_mitm.config import Settings
from polar_mitm.errors import SetupError
from polar_mitm.types import Rollout
from polar_mitm.upstream.engine import EngineInfo

if TYPE_CHECKING:
    from polar_mitm_addons.capture import Capture, Session
    from polar_mitm_addons.chain import ModelCalls
    from polar_mitm_addons.interceptor import Interceptor

    Replaying = Callable[[Capture], ModelCalls]


@dataclass
class Served:
    """What the interceptor saw of a rollout."""

    num_calls: int = 0
    num_sampled_tokens: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    incomplete: str | None = None
    engine_failure: str | None = None


class Host(Protocol):
    """An interceptor, for one rollout after another or several at once."""

    ca_pem: bytes

    @property
    def store(self) -> Path | None:
        """Where it records, as far as is known."""
        ...

    async def open(self, rollout: Rollout, sockets: list[socket.socket]) -> None: ...

    async def close(self, rollout: Rollout) -> Served: ...


class EmbeddedHost:
    """The interceptor runs in this process."""

    def __init__(self, interceptor: Interceptor) -> None:
        self.interceptor = interceptor
        self._sessions: dict[str, Session] = {}
        self.ca_pem = interceptor.ca_pem

    @property
    def store(self) -> Path:
        """The store, or the rescue store where that could not be written."""
        path: Path = self.interceptor.recorder.path
        return path

    def so_far(self) -> tuple[int, int]:
        """Calls and sampled tokens of the rollouts that run."""
        running = self._sessions.values()
        return sum(s.num_calls for s in running), sum(s.num_sampled_tokens for s in running)

    async def open(self, rollout: Rollout, sockets: list[socket.socket]) -> None:
        session = await self.interceptor.open_rollout(rollout)
        self._sessions[rollout.rollout_id] = session
        await self.interceptor.serve(session, sockets)

    async def close(self, rollout: Rollout) -> Served:
        session = self._sessions.pop(rollout.rollout_id, None)
        if session is None:
            return Served()
        await self.interceptor.close_rollout(session, rollout)
        return Served(
            session.num_calls,
            session.num_sampled_tokens,
            dict(session.refused),
            rollout.incomplete,
            session.engine_failure,
        )


class ControlHost:
    """The interceptor is another process, behind its control socket. One instance per rollout.

    Raises:
        SetupError: nobody answers there.
    """

    store = None

    def __init__(self, path: Path) -> None:
        from polar_mitm_addons.control import ControlClient

        try:
            self._client = ControlClient(path)
        except (OSError, RuntimeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise SetupError(
                f"no interceptor answers on {path} ({reason}): start one with `polar-mitm up --store FILE`, "
                "which prints its socket"
            ) from error
        self.ca_pem = self._client.ca_pem

    async def open(self, rollout: Rollout, sockets: list[socket.socket]) -> None:
        try:
            await asyncio.to_thread(self._client.open, rollout, sockets)
        except (OSError, RuntimeError) as error:
            raise SetupError(f"the interceptor did not take the rollout: {error}") from error
        finally:
            for sock in sockets:
                sock.close()  # the interceptor has its own descriptors of them

    async def close(self, rollout: Rollout) -> Served:
        try:
            summary = await asyncio.to_thread(self._client.close, rollout)
        except (OSError, RuntimeError) as error:
            return Served(incomplete=f"the interceptor was lost: {error}")
        return Served(summary.num_calls, summary.num_sampled_tokens, summary.refused, summary.incomplete)


@asynccontextmanager
async def embedded(
    settings: Settings, engine: EngineInfo, store: Path, replaying: Replaying | None = None
) -> AsyncIterator[EmbeddedHost]:
    """An interceptor in this process, writing to `store`, until the block ends; or one that replays."""
    from polar_mitm.store import Recorder
    from polar_mitm_addons.interceptor import Interceptor

    recorder = Recorder(
        store,
        flush_interval_s=settings.flush_interval_s,
        on_alarm=lambda text: say(f"store: {text}", style="red"),
    )
    model_calls = {} if replaying is None else {"model_calls": replaying}
    await asyncio.to_thread(recorder.open)
    try:
        async with Interceptor(settings, engine, recorder, **model_calls) as interceptor:
            yield EmbeddedHost(interceptor)
    finally:
        await asyncio.to_thread(recorder.close)


@asynccontextmanager
async def counting(host: EmbeddedHost, text: str, doing: Callable[[], str]) -> AsyncIterator[None]:
    """A spinner until the block ends: first with `text`, then with what is being done and was seen."""
    with progress(text) as step:

        async def count() -> None:
            while True:
                num_calls, num_sampled = host.so_far()
                seen = f"{plural(num_calls, 'call')}, {plural(num_sampled, 'sampled token')} under way"
                step.update(f"{doing()}: {seen}")
                await asyncio.sleep(0.3)

        counter = asyncio.create_task(count())
        try:
            yield
        finally:
            counter.cancel()
