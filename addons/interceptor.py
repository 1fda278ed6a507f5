"""A running interceptor: `Serving` is what any host of our addons offers, `Interceptor` embeds mitmproxy.

Stock mitmdump spends near half its time in default addons that a capture has no use for; the embedded
`Master` has five of mitmproxy's and ours.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mitmproxy import options
from mitmproxy.addons import core, next_layer, proxyserver, tlsconfig
from mitmproxy.master import Master

from polar_mitm.config import Settings
from polar_mitm.types import Rollout
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm_addons.capture import Capture, Session, new_http
from polar_mitm_addons.chain import OPTIONS, Chain, ModelCalls
from polar_mitm_addons.dispatch import direct_handler
from polar_mitm_addons.intercept import Intercept
from polar_mitm_addons.restore import restore
from polar_mitm_addons.weights_watch import WeightsWatch

if TYPE_CHECKING:
    from polar_mitm.store import Recorder


class Serving:
    """Rollouts on a chain of addons that some mitmproxy hosts."""

    ca_pem = b""

    def __init__(
        self,
        settings: Settings,
        engine: EngineInfo,
        recorder: Recorder,
        model_calls: Callable[[Capture], ModelCalls] = Intercept,
    ) -> None:
        self.recorder = recorder
        self.capture = Capture(settings, engine, recorder, new_http(settings))
        self.chain = Chain(self.capture, model_calls)
        self.watch = WeightsWatch(self.capture)
        self._open: dict[str, Rollout] = {}
        self._closed: set[str] = set()

    @property
    def engine(self) -> EngineInfo:
        """The engine, with the version of the weights that it has now."""
        return self.capture.engine

    async def open_rollout(self, rollout: Rollout) -> Session:
        """Record that a rollout begins, or goes on: its recorded calls can then be continued.

        Raises:
            ValueError: a rollout of this id is open already.
        """
        if rollout.rollout_id in self._open:
            raise ValueError(f"rollout {rollout.rollout_id} is open already")
        self.watch.start()
        self._open[rollout.rollout_id] = rollout
        rollout.started_at = rollout.started_at or time.time()
        rollout.engine, rollout.model = self.engine.url, self.engine.model
        rollout.keep_reasoning = self.capture.settings.keep_reasoning
        await asyncio.wrap_future(self.recorder.rollout(rollout))
        session = Session(rollout.rollout_id)
        if rollout.rollout_id in self._closed or rollout.rollout_id in self.recorder.found:
            await asyncio.to_thread(restore, session, self.recorder.path, self.engine.tokenizer)
        return session

    async def serve(self, session: Session, sockets: list[socket.socket]) -> None:
        """Accept on sockets that were made inside the rollout's sandbox.

        Raises:
            ValueError: the rollout is being served already.
        """
        await self.chain.listeners.serve(session, sockets)

    async def close_rollout(self, session: Session, rollout: Rollout) -> None:
        """Stop serving, record what is in flight, then the rollout's outcome."""
        session.closed = True  # a request that is on its way already comes too late
        await self.chain.listeners.close(session)
        await self.chain.intercept.end(session)
        opened = self._open.pop(session.rollout_id, rollout)
        self._closed.add(session.rollout_id)
        # A runner in another process ends it with a copy of its own.
        rollout.started_at, rollout.engine, rollout.model = opened.started_at, opened.engine, opened.model
        rollout.keep_reasoning = opened.keep_reasoning
        rollout.ended_at = time.time()
        rollout.incomplete = (
            rollout.incomplete or session.incomplete or self.recorder.incomplete(session.rollout_id)
        )
        await asyncio.wrap_future(self.recorder.rollout(rollout))

    async def close(self) -> None:
        await self.chain.intercept.end()
        await self.watch.close()
        await self.capture.http.close()


class Interceptor(Serving):
    """`Serving` with a mitmproxy of its own, as an async context manager.

        async with Interceptor(settings, engine, recorder) as interceptor:
            session = await interceptor.open_rollout(rollout)
            await interceptor.serve(session, sockets)       # passed out of the sandbox
            ...
            await interceptor.close_rollout(session, rollout)

    `ca_pem` is the certificate that the sandbox has to trust. Its key is made anew for each interceptor and
    lives in a directory that only this user can read.
    """

    async def __aenter__(self) -> Self:
        logging.getLogger("mitmproxy").setLevel(logging.WARNING)  # it logs each connection at INFO
        self._confdir = tempfile.TemporaryDirectory(prefix="polar-mitm-ca-")
        self._master = Master(options.Options())
        self._master.addons.add(
            core.Core(), proxyserver.Proxyserver(), next_layer.NextLayer(), tlsconfig.TlsConfig(), self.chain
        )
        self.chain.listeners.handler = direct_handler(self._master)
        streams = self.chain.streaming.stream_type
        streams.announce = False  # none of these addons looks at answers
        streams.identify = staticmethod(self.chain.identify.requestheaders)
        # Naming the directory makes TlsConfig create the CA in it.
        self._master.options.update(server=False, confdir=self._confdir.name, **OPTIONS)
        self.ca_pem = (Path(self._confdir.name) / "mitmproxy-ca-cert.pem").read_bytes()
        self._running = asyncio.create_task(self._master.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
        self._master.shutdown()
        await self._running
        self._confdir.cleanup()
