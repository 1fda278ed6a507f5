"""Which earlier call of its rollout a request continues, and whether its history still is what that call saw.

Every answer of ours carries ids that we minted, and harnesses echo them: the last answer in a request's
history names the parent. An answer without a surviving id is found by what was asked and said. Then the whole
history must be the parent's own, up to the declared harmless edits (`equivalence`); any other edit, another
tool list or another system prompt means no parent. Nothing is joined by guess.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import Struct, field

from polar_mitm.dialects.ids import call_id_of
from polar_mitm.equivalence import HARMLESS, edits_between
from polar_mitm.types import ChatRequest, Message, ModelCall, Tool

Fallback = Literal[
    "first_call",  # no answer in the history
    "compacted",  # no answer in the history, but a summary of ours
    "no_parent",  # answers that this rollout did not give
    "history_edited",  # something before or in the last answer is not what it was
    "system_changed",
    "tools_changed",
    "parent_not_usable",  # it was cut off, failed, or left no token ids
    "parent_evicted",  # it is too long ago, and its ids are forgotten
    "ambiguous",  # several calls fit, with different token ids
]
"""Why `Lineage.find` found no parent."""

MAX_BYTES = 64 << 20


class Known(Struct, eq=False):
    """A call that others may continue.

    `prompt_token_ids` [P], `completion_token_ids` [C]. `rendered` is what the engine's template made of its
    messages, where that is known and not its prompt. `answer` is what was said, `messages` what was asked.
    """

    call_id: str
    prompt_token_ids: Sequence[int]
    completion_token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    answer: Message
    messages: list[Message]
    tools: list[Tool]
    rendered: bytes | Sequence[int] | None = None
    delivered: bool = False
    num_continued: int = 0
    """How many known calls continue it."""

    @property
    def num_messages(self) -> int:
        """How many messages it was asked with: its answer comes next in a history."""
        return len(self.messages)


class Found(Struct):
    """What `Lineage.find` says: a `parent`, or a `fallback`, the reason why there is none.

    With a parent, `request.messages[:num_history]` ends with its answer, and `edits` are the harmless edits
    of that history. `named` is the call whose answer is last in it, also where it cannot be continued.
    """

    parent: Known | None = None
    fallback: Fallback | None = None
    edits: list[str] = field(default_factory=list)
    num_history: int = 0
    named: str | None = None


class Lineage:
    """The calls of one rollout. Not for several threads at once."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._known: OrderedDict[str, Known] = OrderedDict()

    def find(self, request: ChatRequest) -> Found:
        """The call that `request` continues."""
        answers = [n for n, message in enumerate(request.messages) if message.role == "assistant"]
        if not answers:
            return Found(fallback="first_call")
        last = answers[-1]
        named = [c for c in map(call_id_of, request.messages[last].minted_ids) if c]
        if not named:
            return Found(fallback="no_parent")
        known = self._known.get(named[0])
        if known is None:
            return Found(fallback="no_parent", named=named[0])
        return self._check(known, request, last)

    def _check(self, known: Known, request: ChatRequest, at: int) -> Found:
        if known.tools != request.tools:
            return Found(fallback="tools_changed", named=known.call_id)
        if known.num_messages != at:
            return Found(fallback="history_edited", named=known.call_id)
        edits: set[str] = set()
        for ours, theirs in zip([*known.messages, known.answer], request.messages, strict=False):
            if ours == theirs:
                continue
            if ours.role == "system":
                return Found(fallback="system_changed", named=known.call_id)
            some = edits_between(ours, theirs) if ours.role == "assistant" else None
            if some is None:
                return Found(fallback="history_edited", named=known.call_id)
            edits.update(some)
        return Found(known, None, [e for e in HARMLESS if e in edits], at + 1, known.call_id)

    def add(
        self,
        call: ModelCall,
        request: ChatRequest,
        rendered: bytes | Sequence[int] | None = None,
        stop_reason: str | int | None = None,
    ) -> None:
        """Remember a call that has ended. One that was not answered to the end becomes no parent."""
        if call.status != "ok" or call.answer is None or not call.completion_token_ids:
            return
        self._known[call.call_id] = Known(
            call.call_id,
            call.prompt_token_ids,
            call.completion_token_ids,
            call.finish_reason,
            stop_reason,
            call.answer,
            request.messages,
            request.tools,
            rendered,
            call.delivered,
        )

    def restore(self, calls: Iterable[tuple[ModelCall, ChatRequest]]) -> None:
        """Remember stored calls, oldest first, as after a restart."""
        for call, request in calls:
            self.add(call, request)
