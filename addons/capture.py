"""What the addons share: one capture, its sessions, and the ways to write something down about them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
from msgspec.structs import replace

from polar_mitm.config import Settings
from polar_mitm.dialects.responses_state import Responses
from polar_mitm.dialects.routes import owner
from polar_mitm.lineage import Lineage
from polar_mitm.types import EgressEvent, EgressLayer, EgressVerdict, ModelCall
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm.upstream.render import Answers

if TYPE_CHECKING:
    from polar_mitm.store import Recorder

logger = logging.getLogger(__name__)

RECORD_TIMEOUT_S = 10.0
MAX_EVENTS_PER_NAME = 100
MAX_NAMES = 1000
_OF_ENGINE = ("overloaded:", "upstream:")  # not a prompt that is too long, which is the agent's doing


@dataclass
class Session:
    """One rollout as the interceptor sees it: which connections are its own, and what it did so far."""

    rollout_id: str
    num_calls: int = 0
    num_sampled_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    incomplete: str | None = None
    engine_failure: str | None = None
    """What ended the last call, where it was the engine and no call has been answered since."""
    closed: bool = False
    seq: int = 0
    lineage: Lineage = field(default_factory=Lineage)
    responses: Responses = field(default_factory=Responses)

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq - 1


@dataclass
class Capture:
    """Everything that one interceptor process works with. Nothing in it is reachable from a sandbox."""

    settings: Settings
    engine: EngineInfo
    recorder: Recorder
    http: aiohttp.ClientSession
    observe: Callable[[ModelCall], None] = lambda call: None
    answers: Answers = field(default_factory=Answers)
    default: Session | None = None
    clients: dict[str, Session] = field(default_factory=dict)
    coming: set[object] = field(default_factory=set)
    """Calls in flight whose records are still to come."""
    silent: set[str] = field(default_factory=set)
    """Ids of clients that have neither begun TLS nor made a request yet."""

    def provider(self, host: str) -> str | None:
        """The provider that `host` belongs to, or its own name where it serves no models; None for a host
        that nobody may talk to.
        """
        host = host.rstrip(".").lower()
        return self.settings.hosts.get(host) or owner(host)

    def session(self, client_id: str) -> Session | None:
        """Whose connection this is: decided by the listener that accepted it, never by its content."""
        session = self.clients.get(client_id, self.default)
        return None if session is None or session.closed else session

    def policy_version(self) -> str:
        """The engine's word for the weights that it samples under now."""
        return self.engine.policy_version

    def policy_changed(self, version: str) -> None:
        """The engine has other weights from now on. Tokens that arrive bear this version, also of calls in
        flight: say it while the engine is paused.
        """
        self.engine = replace(self.engine, policy_version=version)

    async def record(self, session: Session, call: ModelCall) -> None:
        """Make a call durable. Whatever goes wrong here, the harness gets its answer."""
        session.num_calls += 1
        if call.status == "ok":
            session.engine_failure = None
        elif call.status == "failed" and (call.error or "").startswith(_OF_ENGINE):
            session.engine_failure = call.error
        try:
            self.observe(call)
            async with asyncio.timeout(RECORD_TIMEOUT_S):
                # Where this gives False, the recorder itself has marked the rollout.
                await asyncio.wrap_future(self.recorder.call(call))
        except Exception as error:
            logger.exception("call %s may not be in the store", call.call_id)
            session.incomplete = f"call {call.call_id} may not be in the store: {error!r}"

    def egress(
        self, session: Session, verdict: EgressVerdict, layer: EgressLayer, name: str, detail: str = ""
    ) -> None:
        """Record traffic that is no model call. A loop of look-ups is capped per name and in names."""
        if verdict == "refused":
            key = name if name in session.refused or len(session.refused) < MAX_NAMES else "(other names)"
            session.refused[key] += 1
            if session.refused[key] > MAX_EVENTS_PER_NAME:
                return
        event = EgressEvent(session.rollout_id, time.time(), verdict, layer, name[:512], detail[:512])
        self.recorder.egress(event)


def new_http(settings: Settings) -> aiohttp.ClientSession:
    """The client that talks to the engine: no proxy of the environment, no limit but our own."""
    return aiohttp.ClientSession(
        # Engines (uvicorn) close idle connections after 5 s; be the first to.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s),
        auto_decompress=True,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )
