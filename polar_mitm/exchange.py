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

import logging
import time
from collections.abc import Callable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from polar_mitm.config import Settings
from polar_mitm.continuation import Continued, Steps, go_on, remembering
from polar_mitm.dialects.base import Dialect, Reply, StreamEncoder
from polar_mitm.dialects.ids import new_id, sibling
from polar_mitm.dialects.responses_state import Responses
from polar_mitm.dialects.roles import caller
from polar_mitm.dialects.windows import Scale, scale_for
from polar_mitm.errors import PolarError
from polar_mitm.gathered import Gathered, further, shares
from polar_mitm.lineage import Found, Lineage
from polar_mitm.types import (
    CallStatus,
    ChatRequest,
    Completion,
    Delta,
    ModelCall,
    Sampling,
    Usage,
    Wire,
)
from polar_mitm.upstream import vllm
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm.upstream.render import Answers, Lookup, with_prompt

logger = logging.getLogger(__name__)

CLAMPED = "clamped:max_tokens"
"""The note of a call whose answer had less room than was asked for."""


class UpstreamRequest(Struct):
    """What to POST to the engine. `stream` says whether the harness wants the answer as it comes."""

    url: str
    body: bytes
    stream: bool


class Lookups(Struct):
    """What to POST to the engine at `url`, all at once; `Exchange.answered` takes the answers' bodies."""

    url: str
    lookups: list[Lookup]


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
        self._lineage = lineage
        self._responses = responses or Responses()
        self._answers = answers or Answers()
        self._found = Found()
        self._steps: Steps | None = None
        self._continued = Continued()
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._stream = vllm.ChatStream()
        self._encoder: StreamEncoder | None = None
        self._request: ChatRequest | None = None
        self._usage = Usage()
        self._scale = Scale()
        self._clamped = False
        self._sent: list[bytes] = []
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
        self._gathered = [Gathered(self.call)]
        self.ended = False
        """The call has an outcome."""

    @property
    def completion(self) -> Completion:
        """The first answer, as far as it has come."""
        return self._gathered[0].completion

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
            call.sampling_requested = request.sampling
            call.sampling = self._decide(request.sampling)
            self._scale = scale_for(request.model, headers, self._engine.max_model_len, self._settings)
            self._limit(request)
            call.upstream_body = vllm.build_body(request, call.sampling, self._engine)
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
        self._stream = vllm.ChatStream(request.n, request.top_logprobs)
        self._gathered += [
            Gathered(replace(call, call_id=sibling(call.call_id, k))) for k in range(1, request.n)
        ]
        return self._continue(request)

    def _limit(self, request: ChatRequest) -> None:
        most = self._settings.max_answers
        if not 1 <= request.n <= most:
            raise PolarError(
                "bad_request", f"n: {request.n} answers are asked for, and 1 to {most} are given"
            )

    def _continue(self, request: ChatRequest) -> Step:
        """Find the call that this one continues. Whatever goes wrong, it can be rendered anew."""
        if self._lineage is None:
            return self._ask()
        try:
            found = self._found = self._lineage.find(request)
        except Exception:
            logger.exception("lineage of call %s", self.call.call_id)
            return self._plainly("internal_error")
        self.call.parent_call_id = found.named
        if found.parent is None:
            return self._plainly(found.fallback or "no_parent")
        if not self._settings.continuation:
            return self._plainly("continuation_off")
        if not self._answers.token_input:
            return self._plainly("engine_without_token_input")
        steps = go_on(
            found,
            request,
            self.call.upstream_body,
            lambda messages: vllm.build_body(
                replace(request, messages=messages), self.call.sampling, self._engine
            ),
            self._engine,
            self._settings.keep_reasoning,
        )
        self._steps = remembering(steps, self._answers)
        return self.answered(None)

    def answered(self, answers: list[bytes | None] | None) -> Step:
        """The engine's answers to the lookups of the last step, in order; None for one that failed."""
        assert self._steps is not None
        try:
            lookups = next(self._steps) if answers is None else self._steps.send(answers)
            return Lookups(self._engine.url, lookups)
        except StopIteration as stop:
            self._continued = stop.value
        except Exception:
            logger.exception("continuation of call %s", self.call.call_id)
            return self._plainly("internal_error")
        if self._continued.prompt_token_ids is None:
            return self._plainly(self._continued.fallback or "internal_error")
        self.call.continuation = "exact"
        self.call.edits = [*self._found.edits, *self._continued.edits]
        return self._ask()

    def _plainly(self, fallback: str) -> UpstreamRequest:
        """Have the engine render the messages."""
        self.call.continuation, self.call.fallback, self.call.edits = "none", fallback, []
        self._continued = Continued()
        return self._ask()

    def _ask(self) -> UpstreamRequest:
        assert self._request is not None
        body, prompt = self.call.upstream_body, self._continued.prompt_token_ids
        body = body if prompt is None else with_prompt(body, prompt)
        return UpstreamRequest(self._engine.url + vllm.CHAT_PATH, body, self._request.stream)

    def refuse(self, error: PolarError, wire: Wire | None = None) -> Reply:
        """End the call without the engine: the harness's request cannot be served."""
        if wire is not None:
            self.call.wire = wire
            self.call.route = f"{wire.method} {wire.path.partition('?')[0]}"
        return self._reply("refused", error)

    def _decide(self, asked: Sampling) -> Sampling:
        """The rollout's configuration wins. Room for an answer is the engine's window at most."""
        limits = [n for n in (asked.max_tokens, self._settings.max_tokens) if n is not None]
        room = min(limits) if limits else None
        if room is not None and self._engine.max_model_len and room >= self._engine.max_model_len:
            room = None  # the engine then gives what its window has left
        ours = self._settings
        return Sampling(ours.temperature, ours.top_p, ours.top_k, room, asked.stop)

    def _fit(self, num_prompt: int) -> bool:
        """The answer has what the prompt leaves of the engine's window, and the record says so."""
        room, asked = self._engine.max_model_len - num_prompt, self.call.sampling_requested.max_tokens
        limits = [n for n in (asked, self._settings.max_tokens) if n is not None]
        if room < 1 or not limits or min(limits) <= room:
            return False
        self.call.sampling.max_tokens = room
        if CLAMPED not in self.call.notes:
            self.call.notes.append(CLAMPED)
        return True

    # -- the answer ----------------------------------------------------------------------------------

    def open(self) -> dict[str, str]:
        """Headers of the streaming 200, which is now released: from here on errors are stream events."""
        headers = self._dialect.stream_headers(self.call.call_id, self._request)
        self._head(200, headers)
        return headers

    def opening(self) -> bytes:
        """The stream's first bytes, for an engine that is slow to give any; `feed` brings them otherwise."""
        return self._emit(self._begin())

    def keepalive(self) -> bytes:
        """Bytes that tell a waiting harness that we live; maybe none."""
        if self._encoder is None or self.ended:
            return b""
        return self._emit(self._begin() + self._encoder.keepalive())

    def feed(self, data: bytes) -> bytes:
        """A chunk from the engine; returns what the harness gets for it, at once."""
        if self.ended:
            return b""
        out: list[bytes] = []
        try:
            for delta in self._stream.feed(data):
                self._absorb(delta)
                if self._encoder is not None:
                    out.append(self._begin())
                    out.append(self._encoder.delta(self._scale.delta(delta)))
        except PolarError as error:
            out.append(self._break(error))
        except Exception as error:
            out.append(self._break(PolarError("internal", f"cannot translate the answer: {error!r}")))
        return self._emit(b"".join(out))

    def finish(self) -> bytes | Reply:
        """The engine's answer has ended: the terminal bytes of a stream, or the whole answer, which a stream
        is too whose head nobody had a reason to `open`."""
        if self.ended:
            error, self._unsaid = self._unsaid, None
            return b"" if error is None else self._reply("failed", error)
        if not self._stream.done or not all(answer.whole for answer in self._gathered):
            return self.fail(PolarError("upstream", "the engine's answer broke off"))
        assert self._request is not None
        self._settle()
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
            end = self._emit(tail)
            return end if self._released else Reply(200, b"".join(self._sent), self.open())
        self._keep(reply)
        return reply

    def reject(self, status: int, body: bytes) -> Reply | UpstreamRequest:
        """The engine answered with an HTTP error. It is asked again where that may be for our prompt of ids,
        or for room that it does not have for the answer: not every engine cuts that down by itself.
        """
        error = vllm.rejection(status, body, self._settings.retry_after_s)
        over = error.overflow
        if over is not None and not self._clamped and self._fit(over.tokens):
            self._clamped = True
            assert self._request is not None
            self.call.upstream_body = vllm.build_body(self._request, self.call.sampling, self._engine)
            return self._ask()
        if self._continued.prompt_token_ids is not None and status in (400, 422):
            return self._plainly("engine_refused_token_input")
        return self._reply("failed", error)

    def fail(self, error: PolarError) -> bytes | Reply:
        """End the call with an error: in the stream where it has begun, else as a whole answer."""
        if self.ended:
            return self.finish()
        if self._released:
            return self._emit(self._break(error))
        return self._reply("failed", self._retryable(error))

    def cancel(self) -> None:
        """The harness hung up. What was sampled is kept."""
        if not self.ended:
            self._settle()
            self._end("cancelled")
            self.call.error = "the harness hung up"

    def record(self, *, delivered: bool) -> ModelCall:
        """The first of `records`."""
        return self.records(delivered=delivered)[0]

    def records(self, *, delivered: bool) -> list[ModelCall]:
        """The call as a row, and as many as there are answers: the first has the wire, the others name it.

        `delivered`: the harness's connection took every byte so far.
        """
        call = self.call
        call.delivered = delivered and call.status == "ok"
        call.wire.response_body = b"".join(self._sent)
        for answer, usage in zip(self._gathered, self._shares(), strict=True):
            done = answer.completion
            if answer.call is not call:
                answer.call = further(call, answer.call)
            answer.call.prompt_token_ids = done.prompt_token_ids
            answer.call.completion_token_ids = done.completion_token_ids
            answer.call.behaviour_logprobs = done.behaviour_logprobs
            answer.call.usage = usage
            answer.call.finish_reason = done.finish_reason
            if call.status in ("ok", "cancelled"):
                answer.call.answer = done.message
        self._remember()
        return [answer.call for answer in self._gathered]

    def _remember(self) -> None:
        """Later calls may continue this one, or refer to it."""
        if self.call.status == "ok":
            self._responses.keep(self.call.dialect, self.call.wire)
        if self._lineage is None or self._request is None:
            return
        rendered: bytes | None = None  # the prompt is the rendering
        if self._continued.rendered is not None:
            text = self._continued.rendered.text
            rendered = None if self._continued.rendered == self.completion.prompt_token_ids else text
        for answer in self._gathered:
            try:
                self._lineage.add(answer.call, self._request, rendered, answer.completion.stop_reason)
            except Exception:
                logger.exception("lineage of call %s", answer.call.call_id)

    # -- inside --------------------------------------------------------------------------------------

    def _absorb(self, delta: Delta) -> None:
        if delta.prompt_token_ids is not None:
            self._fit(len(delta.prompt_token_ids))
            for answer in self._gathered:
                answer.completion.prompt_token_ids = delta.prompt_token_ids
            if self._continued.prompt_token_ids not in (None, delta.prompt_token_ids):
                self._ignored()
        if delta.usage is not None:
            self._usage = delta.usage
        self._gathered[delta.choice].add(delta, self._clock, self._policy_version() or None)

    def _ignored(self) -> None:
        """The engine has used another prompt than the ids that it was given: never give it any again."""
        logger.error("the engine ignores token ids as a prompt: no call is continued from here on")
        self._answers.token_input = False
        self._continued = Continued()
        self.call.continuation, self.call.edits = "none", []
        self.call.fallback = "engine_ignored_token_input"

    def _settle(self) -> None:
        """Put together what the answers say."""
        for answer in self._gathered:
            answer.settle(self._request, self._dialect.tool_id_prefix)
        every = [answer.completion for answer in self._gathered]
        for done, usage in zip(every, self._shares(), strict=True):
            done.usage = usage
        self.completion.others = every[1:]

    def _shares(self) -> list[Usage]:
        return shares(self._usage, [len(a.completion.completion_token_ids) for a in self._gathered])

    @property
    def _released(self) -> bool:
        """The head of a stream is with the harness."""
        return self._encoder is not None and self.call.wire.status != 0

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
        self._sent.clear()  # whatever was translated before the error was never released
        self.call.wire.chunk_sizes.clear()
        self.call.wire.chunk_at_ms.clear()
        shown = self._scale.error(error, self._dialect.name)
        reply = self._dialect.encode_error(shown, self.call.call_id)
        self._keep(reply)
        return reply

    def _end(self, status: CallStatus, error: PolarError | None = None) -> None:
        self.ended = True
        self.call.status = status
        self.call.ended_at = self._clock()
        if error is not None:
            self.call.error = f"{error.kind}: {error.message}"

    def _keep(self, reply: Reply) -> None:
        self._head(reply.status, reply.headers)
        self._emit(reply.body)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.call.wire.status = status
        self.call.wire.response_headers = list(headers.items())

    def _emit(self, data: bytes) -> bytes:
        if data:
            self._sent.append(data)
            self.call.wire.chunk_sizes.append(len(data))
            self.call.wire.chunk_at_ms.append((self._clock() - self.call.started_at) * 1000)
        return data
