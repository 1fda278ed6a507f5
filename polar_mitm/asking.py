"""What a call asks the engine: how to sample, which call to go on from, and what to ask when refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from polar_mitm.config import Settings
from polar_mitm.continuation import Continued, Steps, go_on, remembering
from polar_mitm.errors import PolarError
from polar_mitm.gathered import Gathered
from polar_mitm.lineage import Found, Lineage
from polar_mitm.types import ChatRequest, ModelCall, Sampling
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


class Asking:
    """See the module. What is decided stands in the record, `call`, as soon as it is.

    Without a `lineage`, the calls of the rollout so far, it continues none. `answers` is what the engine was
    asked before, by any call.
    """

    def __init__(
        self,
        call: ModelCall,
        engine: EngineInfo,
        settings: Settings,
        lineage: Lineage | None,
        answers: Answers,
    ) -> None:
        self._call = call
        self._engine = engine
        self._settings = settings
        self._lineage = lineage
        self._answers = answers
        self._request: ChatRequest | None = None
        self._found = Found()
        self._steps: Steps | None = None
        self._continued = Continued()
        self._clamped = False

    def build(self, request: ChatRequest) -> None:
        """Decide how to sample, and write the chat completion's body.

        Raises:
            PolarError: kind `bad_request`, for more answers than are given.
        """
        self._call.sampling_requested = request.sampling
        self._call.sampling = self._decide(request.sampling)
        most = self._settings.max_answers
        if not 1 <= request.n <= most:
            raise PolarError(
                "bad_request", f"n: {request.n} answers are asked for, and 1 to {most} are given"
            )
        self._call.upstream_body = vllm.build_body(request, self._call.sampling, self._engine)

    def first(self, request: ChatRequest) -> UpstreamRequest | Lookups:
        """Find the call that the request continues. Whatever goes wrong, it can be rendered anew."""
        self._request = request
        if self._lineage is None:
            return self._ask()
        try:
            found = self._found = self._lineage.find(request)
        except Exception:
            logger.exception("lineage of call %s", self._call.call_id)
            return self._plainly("internal_error")
        self._call.parent_call_id = found.named
        if found.parent is None:
            return self._plainly(found.fallback or "no_parent")
        if not self._settings.continuation:
            return self._plainly("continuation_off")
        if not self._answers.token_input:
            return self._plainly("engine_without_token_input")
        steps = go_on(
            found,
            request,
            self._call.upstream_body,
            lambda messages: vllm.build_body(
                replace(request, messages=messages), self._call.sampling, self._engine
            ),
            self._engine,
            self._settings.keep_reasoning,
        )
        self._steps = remembering(steps, self._answers)
        return self.answered(None)

    def answered(self, answers: list[bytes | None] | None) -> UpstreamRequest | Lookups:
        """The engine's answers to the lookups of the last step, in order; None for one that failed."""
        assert self._steps is not None
        try:
            lookups = next(self._steps) if answers is None else self._steps.send(answers)
            return Lookups(self._engine.url, lookups)
        except StopIteration as stop:
            self._continued = stop.value
        except Exception:
            logger.exception("continuation of call %s", self._call.call_id)
            return self._plainly("internal_error")
        if self._continued.prompt_token_ids is None:
            return self._plainly(self._continued.fallback or "internal_error")
        self._call.continuation = "exact"
        self._call.edits = [*self._found.edits, *self._continued.edits]
        return self._ask()

    def again(self, status: int, error: PolarError) -> UpstreamRequest | None:
        """What to ask after the engine answered with an HTTP error. It is asked again where that may be for
        our prompt of ids, or for room that it does not have for the answer: not every engine cuts that down
        by itself. None: the error is the call's end.
        """
        over = error.overflow
        if over is not None and not self._clamped and self._fit(over.tokens):
            self._clamped = True
            assert self._request is not None
            self._call.upstream_body = vllm.build_body(self._request, self._call.sampling, self._engine)
            return self._ask()
        if self._continued.prompt_token_ids is not None and status in (400, 422):
            return self._plainly("engine_refused_token_input")
        return None

    def heard(self, prompt: Sequence[int]) -> None:
        """The engine says which ids it was asked with."""
        self._fit(len(prompt))
        if self._continued.prompt_token_ids in (None, prompt):
            return
        # It has used another prompt than it was given: never give it any again.
        logger.error("the engine ignores token ids as a prompt: no call is continued from here on")
        self._answers.token_input = False
        self._render("engine_ignored_token_input")

    def remember(self, answers: Sequence[Gathered]) -> None:
        """Later calls may continue one of these, which have been recorded."""
        if self._lineage is None or self._request is None:
            return
        rendered: bytes | None = None  # the prompt is the rendering
        if (ours := self._continued.rendered) is not None:
            rendered = None if ours == answers[0].completion.prompt_token_ids else ours.text
        for answer in answers:
            try:
                self._lineage.add(answer.call, self._request, rendered, answer.completion.stop_reason)
            except Exception:
                logger.exception("lineage of call %s", answer.call.call_id)

    # -- inside --------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int | None:
        """The most tokens that the harness and the configuration allow an answer."""
        said = (self._call.sampling_requested.max_tokens, self._settings.max_tokens)
        return min((n for n in said if n is not None), default=None)

    def _decide(self, asked: Sampling) -> Sampling:
        """The rollout's configuration wins. Room for an answer is the engine's window at most."""
        ours, room = self._settings, self._limit
        if room is not None and self._engine.max_model_len and room >= self._engine.max_model_len:
            room = None  # the engine then gives what its window has left
        return Sampling(ours.temperature, ours.top_p, ours.top_k, room, asked.stop)

    def _fit(self, num_prompt: int) -> bool:
        """The answer has what the prompt leaves of the engine's window, and the record says so."""
        room, limit = self._engine.max_model_len - num_prompt, self._limit
        if room < 1 or limit is None or limit <= room:
            return False
        self._call.sampling.max_tokens = room
        if CLAMPED not in self._call.notes:
            self._call.notes.append(CLAMPED)
        return True

    def _plainly(self, fallback: str) -> UpstreamRequest:
        """Have the engine render the messages."""
        self._render(fallback)
        return self._ask()

    def _render(self, fallback: str) -> None:
        self._call.continuation, self._call.fallback, self._call.edits = "none", fallback, []
        self._continued = Continued()

    def _ask(self) -> UpstreamRequest:
        assert self._request is not None
        body, prompt = self._call.upstream_body, self._continued.prompt_token_ids
        body = body if prompt is None else with_prompt(body, prompt)
        return UpstreamRequest(self._engine.url + vllm.CHAT_PATH, body, self._request.stream)
