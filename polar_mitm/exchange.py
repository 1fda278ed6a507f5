"""One intercepted call as a sans-IO machine: request bytes in, wire bytes out, a `ModelCall` at the end.

    exchange = Exchange(...)
    step = exchange.start(...)            # an UpstreamRequest to send, or a Reply: the call ends here
    while isinstance(step, Lookups):      # or questions to the engine first, to continue an earlier call
        step = exchange.answered(answers)
    exchange.feed(chunk) -> bytes         # for each chunk of the engine's answer, to be sent at once
    exchange.finish() -> bytes            # the engine's end: the terminal event, or the whole JSON answer
    exchange.fail(error), .cancel()       # the other two ways to end
    exchange.records() -> [ModelCall]     # what to make durable before the bytes of `finish` are released

A request for several answers (`n`) is one request to the engine and one record for each answer.
Nothing here raises for what a harness or an engine sends, and nothing blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from polar_mitm.asking import Asking, Lookups, UpstreamRequest
from polar_mitm.config import Settings
from polar_mitm.dialects.base import Dialect, Reply, StreamEncoder
from polar_mitm.dialects.ids import new_id
from polar_mitm.dialects.responses_state import Responses
from polar_mitm.dialects.roles import caller
from polar_mitm.dialects.windows import Scale, scale_for
from polar_mitm.errors import PolarError
from polar_mitm.gathered import Choices
from polar_mitm.lineage import Lineage
from polar_mitm.sent import Sent
from polar_mitm.types import CallStatus, ChatRequest, Completion, ModelCall, Wire
from polar_mitm.upstream import vllm
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm.upstream.refusals import rejection
from polar_mitm.upstream.render import Answers
from polar_mitm.upstream.vllm_stream import ChatStream

Step = UpstreamRequest | Reply | Lookups


class Exchange:
    """See the module. One instance is one call and is used by one task.

    Without a `lineage`, the calls of the rollout so far, it continues none. `answers` is what the engine was
    asked before, by any call. `policy_version` says what the engine samples under now; without, what it was
    probed with.
    """

    def __init__(
        self,
        dialect: Dialect,
        engine: EngineInfo,
        settings: Settings,
        *,
        rollout_id: str,
        seq: int,
        clock: Callable[[], float] = time.time,
        call_id: str | None = None,
        lineage: Lineage | None = None,
        responses: Responses | None = None,
        answers: Answers | None = None,
        policy_version: Callable[[], str] | None = None,
    ) -> None:
        self._dialect = dialect
        self._policy_version = policy_version or (lambda: engine.policy_version)
        self._responses = responses or Responses()
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._stream = ChatStream()
        self._encoder: StreamEncoder | None = None
        self._request: ChatRequest | None = None
        self._scale = Scale()
        self._begun = False
        self._unsaid: PolarError | None = None  # it ended the call, and nothing was released
        self.call = ModelCall(
            call_id=call_id or new_id(),
            rollout_id=rollout_id,
            seq=seq,
            dialect=dialect.name,
            route="",
            status="failed",
            model_served=engine.model,
            policy_version=self._policy_version() or None,
            tokenizer=engine.tokenizer,
            started_at=clock(),
        )
        self._asking = Asking(self.call, engine, settings, lineage, answers or Answers())
        self._choices = Choices(self.call)
        self._sent = Sent(self.call, clock)
        self.ended = False
        """The call has an outcome."""

    @property
    def completion(self) -> Completion:
        """The first answer, as far as it has come."""
        return self._choices.each[0].completion

    @property
    def complete(self) -> bool:
        """No further bytes of the engine matter: it is time to `finish`."""
        return self.ended or self._stream.done

    # -- the request ---------------------------------------------------------------------------------

    def start(self, wire: Wire, headers: Mapping[str, str]) -> Step:
        """Decode the harness's request (`wire.request_body`, content-decoded)."""
        call = self.call
        call.wire = wire
        call.route = f"{wire.method} {wire.path.partition('?')[0]}"
        try:
            body = self._responses.whole(self._dialect.name, wire.request_body)
            request = self._dialect.decode(body, headers, wire.path)
            who = caller(headers, request)
            call.role, call.agent_id = who.role, who.agent_id
            self._scale = scale_for(request.model, headers, self._engine.max_model_len, self._settings)
            self._asking.build(request)
            if request.stream:
                self._encoder = self._dialect.encoder(request, call.call_id, call.started_at)
        except PolarError as error:
            return self.refuse(error)
        except Exception as error:  # a bug of ours must not hang a harness or reach the engine
            return self.refuse(PolarError("internal", f"cannot translate the request: {error!r}"))
        call.model_requested = request.model
        call.stream = request.stream
        call.notes = [*request.notes, *vllm.notes(request)]
        self._request = request
        self._stream = ChatStream(request.n, request.top_logprobs)
        self._choices.expect(request.n)
        return self._asking.first(request)

    def answered(self, answers: list[bytes | None]) -> Step:
        """The engine's answers to the lookups of the last step, in order; None for one that failed."""
        return self._asking.answered(answers)

    def refuse(self, error: PolarError, wire: Wire | None = None) -> Reply:
        """End the call without the engine: the harness's request cannot be served."""
        if wire is not None:
            self.call.wire = wire
            self.call.route = f"{wire.method} {wire.path.partition('?')[0]}"
        return self._reply("refused", error)

    # -- the answer ----------------------------------------------------------------------------------

    def open(self) -> dict[str, str]:
        """Headers of the streaming 200, which is now released: from here on errors are stream events."""
        headers = self._dialect.stream_headers(self.call.call_id, self._request)
        self._sent.head(200, headers)
        return headers

    def opening(self) -> bytes:
        """The stream's first bytes, for an engine that is slow to give any; `feed` brings them otherwise."""
        return self._sent.add(self._begin())

    def keepalive(self) -> bytes:
        """Bytes that tell a waiting harness that we live; maybe none."""
        if self._encoder is None or self.ended:
            return b""
        return self._sent.add(self._begin() + self._encoder.keepalive())

    def feed(self, data: bytes) -> bytes:
        """A chunk from the engine; returns what the harness gets for it, at once."""
        if self.ended:
            return b""
        out: list[bytes] = []
        try:
            for delta in self._stream.feed(data):
                if delta.prompt_token_ids is not None:
                    self._asking.heard(delta.prompt_token_ids)
                self._choices.add(delta, self._clock, self._policy_version() or None)
                if self._encoder is not None:
                    out.append(self._begin())
                    out.append(self._encoder.delta(self._scale.delta(delta)))
        except PolarError as error:
            out.append(self._break(error))
        except Exception as error:
            out.append(self._break(PolarError("internal", f"cannot translate the answer: {error!r}")))
        return self._sent.add(b"".join(out))

    def finish(self) -> bytes | Reply:
        """The engine's answer has ended: the terminal bytes of a stream, or the whole answer, which a stream
        is too whose head nobody had a reason to `open`."""
        if self.ended:
            error, self._unsaid = self._unsaid, None
            return b"" if error is None else self._reply("failed", error)
        if not self._stream.done or not self._choices.whole:
            return self.fail(PolarError("upstream", "the engine's answer broke off"))
        assert self._request is not None
        self._choices.settle(self._request, self._dialect.tool_id_prefix)
        try:
            shown = self._scale.completion(self.completion)
            if self._encoder is not None:
                tail = self._encoder.finish(shown)
            else:
                reply = self._dialect.encode(self._request, shown, self.call.call_id, self.call.started_at)
        except Exception as error:
            return self.fail(PolarError("internal", f"cannot encode the answer: {error!r}"))
        self._end("ok")
        if self._encoder is not None:
            end = self._sent.add(tail)
            return end if self._released else Reply(200, self._sent.body, self.open())
        return self._sent.instead(reply)

    def reject(self, status: int, body: bytes) -> Reply | UpstreamRequest:
        """The engine answered with an HTTP error: what to ask it instead, or how the call ends."""
        error = rejection(status, body, self._settings.retry_after_s)
        return self._asking.again(status, error) or self._reply("failed", error)

    def fail(self, error: PolarError) -> bytes | Reply:
        """End the call with an error: in the stream where it has begun, else as a whole answer."""
        if self.ended:
            return self.finish()
        if self._released:
            return self._sent.add(self._break(error))
        return self._reply("failed", self._retryable(error))

    def cancel(self) -> None:
        """The harness hung up. What was sampled is kept."""
        if not self.ended:
            self._choices.settle(self._request, self._dialect.tool_id_prefix)
            self._end("cancelled")
            self.call.error = "the harness hung up"

    def records(self, *, delivered: bool) -> list[ModelCall]:
        """The call as a row, and as many as there are answers: the first has the wire, the others name it.

        `delivered`: the harness's connection took every byte so far.
        """
        call = self.call
        call.delivered = delivered and call.status == "ok"
        call.wire.response_body = self._sent.body
        records = self._choices.records()
        if call.status == "ok":  # later calls may refer to it
            self._responses.keep(call.dialect, call.wire)
        self._asking.remember(self._choices.each)
        return records

    # -- inside --------------------------------------------------------------------------------------

    @property
    def _released(self) -> bool:
        """The head of a stream is with the harness."""
        return self._encoder is not None and self._sent.begun

    def _begin(self) -> bytes:
        if self._begun or self._encoder is None:
            return b""
        self._begun = True
        return self._encoder.start()

    def _break(self, error: PolarError) -> bytes:
        """The answer broke: an event in a released stream, else `finish` gives the reply."""
        if self._released and self._encoder is not None:
            self._end("failed", error)
            try:
                return self._begin() + self._encoder.error(self._scale.error(error, self._dialect.name))
            except Exception:  # the encoder is what failed; the cut stream says it too
                return b""
        self._unsaid = self._retryable(error)
        self._end("failed", self._unsaid)
        return b""

    def _retryable(self, error: PolarError) -> PolarError:
        """Before the first byte a broken engine is an overloaded one: harnesses wait and try again."""
        if error.kind != "upstream":
            return error
        after = self._settings.retry_after_s
        return PolarError("overloaded", error.message, retry_after_s=after, status=error.status)

    def _reply(self, status: CallStatus, error: PolarError) -> Reply:
        self._end(status, error)
        shown = self._scale.error(error, self._dialect.name)
        return self._sent.instead(self._dialect.encode_error(shown, self.call.call_id))

    def _end(self, status: CallStatus, error: PolarError | None = None) -> None:
        self.ended = True
        self.call.status = status
        self.call.ended_at = self._clock()
        if error is not None:
            self.call.error = f"{error.kind}: {error.message}"
