"""Addon: recorded answers in place of an engine's. Takes the place of `Intercept` in a replay.

Each model call is matched to a recorded one and gets its answer, byte for byte: the same status, headers and
pieces, at the same distances in time unless `fast`. What was cut off in the record is cut off here. After a
fork, calls go to the engine as in any capture.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TypeVar

import msgspec
from mitmproxy import connection, http

from polar_mitm.compression import decompress
from polar_mitm.dialects.base import Dialect, Reply
from polar_mitm.dialects.ids import new_id, sibling
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.responses_socket import SOCKET
from polar_mitm.errors import PolarError
from polar_mitm.gathered import further
from polar_mitm.replay import Replay, Step, plan
from polar_mitm.store.redact import credentials, redact_body, redact_headers, redact_path
from polar_mitm.types import ModelCall, Wire
from polar_mitm_addons.capture import RECORD_TIMEOUT_S, Capture, Session
from polar_mitm_addons.intercept import Intercept, model_call, wire_of
from polar_mitm_addons.replies import stream_head, to_response
from polar_mitm_addons.streaming import ANSWER, GONE, Answer, hang_up, send
from polar_mitm_addons.websocket import Message

logger = logging.getLogger(__name__)

CUT_GRACE_S = 1.0
"""How much later than in the record a harness may hang up by itself before it is cut off."""


class ServeRecorded:
    """Answers model calls as `replay` says."""

    def __init__(self, capture: Capture, replay: Replay, *, fast: bool) -> None:
        self._capture = capture
        self._replay = replay
        self._fast = fast
        self._live = Intercept(capture)
        self.websocket = replay.websocket
        self._serving: set[_Served] = set()
        self._ids: dict[str, str] = {}

    async def request(self, flow: http.HTTPFlow) -> None:
        if (asked := model_call(self._capture, flow)) is None:
            return
        session, dialect = asked
        try:
            wire = _whole(flow, self._capture.settings.max_body_bytes)
            step, recorded = self._replay.take(dialect, _as_stored(wire))
            if step.outcome == "live":
                await self._live.request(flow)
            elif recorded is None:
                flow.response = to_response(await self._refuse(session, DIALECTS[dialect], wire, step))
            else:
                served = self._served(_Served, session, flow, wire, step, recorded)
                flow.metadata[GONE] = served.gone.set
                flow.response = await self._begun(served)
        except Exception:  # hooks fail open: whatever happened, the harness gets an answer
            logger.exception("replay failed")
            error = PolarError("internal", "the replay failed; see its log")
            flow.response = to_response(DIALECTS[dialect].encode_error(error))

    async def message(self, session: Session, asked: Message) -> None:
        """The same for a message on a WebSocket."""
        step, recorded = self._replay.take(SOCKET.name, _as_stored(asked.wire))
        if step.outcome == "live":
            await self._live.message(session, asked)
        elif recorded is None:
            await asked.send((await self._refuse(session, SOCKET, asked.wire, step)).body)
        else:
            served = self._served(_ServedMessage, session, asked.flow, asked.wire, step, recorded)
            served.asked, asked.cancel = asked, served.gone.set
            await self._begun(served)
            await asyncio.wait([served.task])

    def client_disconnected(self, client: connection.Client) -> None:
        self._live.client_disconnected(client)
        for served in self._serving:
            if served.flow.client_conn.id == client.id:
                served.gone.set()

    async def end(self, session: Session | None = None) -> None:
        """Break off what is being served, and wait until it is recorded."""
        for served in self._serving:
            served.gone.set()
        if tasks := [served.task for served in self._serving]:
            await asyncio.wait(tasks, timeout=2 * RECORD_TIMEOUT_S)
        await self._live.end(session)

    def _served(
        self,
        kind: type[_S],
        session: Session,
        flow: http.HTTPFlow,
        wire: Wire,
        step: Step,
        recorded: ModelCall,
    ) -> _S:
        call = msgspec.structs.replace(
            recorded,
            call_id=new_id(),
            rollout_id=session.rollout_id,
            seq=session.next_seq(),
            parent_call_id=self._ids.get(recorded.parent_call_id or ""),
            # A replay of a replay serves the first one's bytes, and the ids in them.
            replayed_from=recorded.replayed_from or recorded.call_id,
            started_at=time.time(),
            wire=wire,
        )
        self._ids[recorded.call_id] = call.call_id
        others = [
            msgspec.structs.replace(
                other,
                call_id=sibling(call.call_id, number),
                replayed_from=other.replayed_from or other.call_id,
            )
            for number, other in enumerate(self._replay.others(recorded.call_id), 1)
        ]
        self._ids |= {other.replayed_from or "": other.call_id for other in others}
        return kind(self._capture, session, flow, step, call, others, recorded, fast=self._fast)

    async def _begun(self, served: _Served) -> http.Response:
        """Begin to serve; returns with the head of the answer."""
        self._serving.add(served)
        served.task = asyncio.create_task(served.run())
        served.task.add_done_callback(lambda _: self._serving.discard(served))
        return await served.head

    async def _refuse(self, session: Session, dialect: Dialect, wire: Wire, step: Step) -> Reply:
        """The kind of error that no harness tries again."""
        error = PolarError("bad_request", f"polar-mitm replay: {step.note or 'this call was not recorded'}")
        call = ModelCall(
            new_id(),
            session.rollout_id,
            session.next_seq(),
            dialect.name,
            f"{wire.method} {wire.path.partition('?')[0]}",
            "refused",
            error=f"{error.kind}: {error.message}",
            started_at=time.time(),
            wire=wire,
        )
        reply = dialect.encode_error(error, call.call_id)
        wire.status, wire.response_headers = reply.status, list(reply.headers.items())
        wire.response_body, wire.chunk_sizes, wire.chunk_at_ms = reply.body, [len(reply.body)], [0.0]
        call.ended_at = call.started_at
        await self._capture.record(session, call)
        return reply


class _Served:
    """One recorded answer on its way: a task that lives from the request to the record."""

    def __init__(
        self,
        capture: Capture,
        session: Session,
        flow: http.HTTPFlow,
        step: Step,
        call: ModelCall,
        others: list[ModelCall],
        recorded: ModelCall,
        *,
        fast: bool,
    ) -> None:
        self._capture = capture
        self._session = session
        self.flow = flow
        self._step = step
        self._call = call
        self._others = others
        self._recorded = recorded
        self._fast = fast
        self._sent: list[bytes] = []
        loop = asyncio.get_running_loop()
        self._begun_at = loop.time()
        self.head: asyncio.Future[http.Response] = loop.create_future()
        self.gone = asyncio.Event()
        self.task: asyncio.Task[None]

    async def run(self) -> None:
        """Serve, record, and then let go of the last piece."""
        try:
            await self._run()
        except Exception as error:
            logger.exception("a replayed call failed")
            if not self.head.done():
                self.head.set_exception(error)

    async def _run(self) -> None:
        wire, cut = self._recorded.wire, self._recorded.status == "cancelled"
        streamed = self._recorded.stream and wire.status == 200
        pieces = plan(wire, fast=self._fast) or [(0.0, b"")]
        if not streamed:
            pieces = [(pieces[-1][0], wire.response_body)]
        due, last = (self._hung_up_after(), b"") if cut else pieces.pop()
        for piece in pieces:
            await self._send(*piece)
        if await self._until(due):
            self._keep(last)
        await self._record()
        if cut:
            hang_up(self.flow.client_conn.id)
            if not self.head.done():
                self.head.set_result(http.Response.make(499))  # for nobody
        elif self.head.done():
            await self._put(last, end=True)
        elif streamed:
            await self._release(last)
            await self._put(b"", end=True)
        else:
            await self._whole(wire)

    async def _whole(self, wire: Wire) -> None:
        self.head.set_result(_whole_response(wire))

    async def _put(self, data: bytes, *, end: bool = False) -> bool:
        return await send(self.flow, data, end=end)

    async def _send(self, due: float, data: bytes) -> None:
        """One piece at its time; the first one with the head."""
        if not await self._until(due):
            return
        self._keep(data)
        if not self.head.done():
            await self._release(data)
        elif not await self._put(data):
            self.gone.set()

    async def _release(self, first: bytes) -> None:
        """Let mitmproxy send the head and the first bytes, and wait until it has."""
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.flow.metadata[ANSWER] = Answer(first, lambda: begun.done() or begun.set_result(None))
        chunked = self.flow.request.http_version == "HTTP/1.1"
        self.head.set_result(stream_head(dict(self._recorded.wire.response_headers), chunked=chunked))
        await begun

    async def _until(self, due: float) -> bool:
        """Wait until `due` seconds after the request. False: the harness is gone."""
        delay = self._begun_at + due - asyncio.get_running_loop().time()
        if delay > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.gone.wait(), delay)
        return not self.gone.is_set()

    def _hung_up_after(self) -> float:
        """In the record the harness hung up: it may do so here, for as long and a little more."""
        begun = self._recorded.started_at
        return CUT_GRACE_S + (0.0 if self._fast else (self._recorded.ended_at or begun) - begun)

    def _keep(self, data: bytes) -> None:
        if data:
            wire = self._call.wire
            self._sent.append(data)
            wire.chunk_sizes.append(len(data))
            wire.chunk_at_ms.append((time.time() - self._call.started_at) * 1000)

    async def _record(self) -> None:
        call, recorded = self._call, self._recorded
        call.ended_at = time.time()
        wire = call.wire
        wire.response_body = b"".join(self._sent)
        if wire.response_body:
            wire.status, wire.response_headers = recorded.wire.status, recorded.wire.response_headers
        if recorded.first_token_at is not None and wire.chunk_at_ms:
            call.first_token_at = call.started_at + wire.chunk_at_ms[0] / 1000
        if self.gone.is_set() and recorded.status != "cancelled":
            call.status, call.error = "cancelled", "the harness hung up"
            self._step.note = "the harness hung up, which it did not in the record"
        call.delivered = call.status == "ok"
        calls = [call, *(further(call, other) for other in self._others)]
        self._remember(calls)
        await asyncio.gather(*(self._capture.record(self._session, each) for each in calls))

    def _remember(self, calls: list[ModelCall]) -> None:
        """After a fork, live calls may continue these."""
        call, wire = self._call, self._call.wire
        headers = {name.lower(): value for name, value in wire.request_headers}
        try:
            if call.status == "ok":
                self._session.responses.keep(call.dialect, wire)
            body = self._session.responses.whole(call.dialect, wire.request_body)
            request = DIALECTS[call.dialect].decode(body, headers, wire.path)
            for each in calls:
                self._session.lineage.add(each, request, rendered=b"")
        except PolarError:
            pass  # a refused request, which nothing continues
        except Exception:  # the harness gets its answer all the same
            logger.exception("lineage of call %s", call.call_id)


class _ServedMessage(_Served):
    """A recorded answer whose pieces are messages on a WebSocket."""

    asked: Message
    _rest = b""

    async def _release(self, first: bytes) -> None:
        self.head.set_result(_whole_response(self._recorded.wire))
        await self._put(first)

    async def _put(self, data: bytes, *, end: bool = False) -> bool:
        """Whole messages only: a record whose secrets were taken out is not cut between lines."""
        lines, _, self._rest = (self._rest + data).rpartition(b"\n")
        return await self.asked.send(lines + b"\n") if lines else not self.gone.is_set()

    async def _whole(self, wire: Wire) -> None:
        await self._release(wire.response_body)


_S = TypeVar("_S", bound=_Served)


def _whole(flow: http.HTTPFlow, limit: int) -> Wire:
    """The request with its body decoded; as received where that cannot be done."""
    wire = wire_of(flow)
    wire.request_body = flow.request.raw_content or b""
    with contextlib.suppress(PolarError):
        encoding = flow.request.headers.get("content-encoding", "")
        wire.request_body = decompress(wire.request_body, encoding, limit)
    return wire


def _as_stored(wire: Wire) -> Wire:
    """The request as a store keeps it, to be compared with one from there."""
    known = credentials(wire)
    return Wire(
        wire.method,
        wire.host,
        redact_path(wire.path, known),
        redact_headers(wire.request_headers, known),
        redact_body(wire.request_body, known),
    )


def _whole_response(wire: Wire) -> http.Response:
    headers = http.Headers([(n.encode(), v.encode()) for n, v in wire.response_headers])
    return http.Response.make(wire.status or 502, wire.response_body, headers)
