"""Which earlier call of its rollout a request continues, and whether its history still is what that call saw.

Every answer of ours carries ids that we minted, and harnesses echo them: the last answer in a request's
history names the parent. An answer without a surviving id is found by what was asked and said. Then the whole
history must be the parent's own, up to the declared harmless edits (`equivalence`); any other edit, another
tool list or another system prompt means no parent. Nothing is joined by guess.

Messages are compared as they stand, in C, and what requests share is kept once: a long session costs memory
for its new messages only, and no digest or JSON work for the old ones.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from msgspec import Struct, field

from polar_mitm.dialects.ids import call_id_of
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.responses_state import Responses
from polar_mitm.equivalence import HARMLESS, Edit, edits_between, same
from polar_mitm.errors import PolarError
from polar_mitm.token_ids import TokenIds
from polar_mitm.types import ChatRequest, ImagePart, Message, ModelCall, Tool

Fallback = Literal[
    "first_call",  # no answer in the history
    "compacted",  # no answer in the history, but a summary of ours
    "no_parent",  # answers that this rollout did not give
    "history_edited",  # something before or in the last answer is not what it was
    "system_changed",
    "tools_changed",
    "parent_not_usable",  # it was cut off, failed, or left no token ids
    "parent_evicted",  # it is too long ago: its ids are forgotten
    "ambiguous",  # several calls fit, with different token ids
]
"""Why `Lineage.find` finds no parent."""

MAX_BYTES = 32 << 20
"""What a `Lineage` keeps of a rollout, about: some 50 calls of 100,000 tokens, or all of a shorter one."""
_NUM_RECENT = 8  # calls that a new one is compared with, to keep once what they share


class Known(Struct, eq=False):
    """A call that others may continue.

    `prompt_token_ids` [P], `completion_token_ids` [C]. `rendered` is what the engine's template made of its
    messages: None where that is its prompt, `b""` where it is not known. `messages` and `tools` are what was
    asked, `answer` what was said.
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
    num_found: int = 0
    """How many requests were told that they continue it, answered or not."""
    num_bytes: int = 0
    """What it counts for in the memory of its `Lineage`."""

    @property
    def num_messages(self) -> int:
        """How many messages it was asked with: its answer comes next in a history."""
        return len(self.messages)


class Found(Struct):
    """What `Lineage.find` says: a `parent`, or a `fallback`, the reason why there is none.

    With a parent, `request.messages[:num_history]` ends with its answer, and `edits` are the harmless edits
    that this history shows against what the parent saw and said. `named` is the call whose answer is last in
    the history, also where it cannot be continued.
    """

    parent: Known | None = None
    fallback: Fallback | None = None
    edits: list[Edit] = field(default_factory=list)
    num_history: int = 0
    named: str | None = None


class Lineage:
    """The calls of one rollout, as many as `max_bytes` hold. For one thread.

    It keeps the messages and tools of the requests it is given: they must not be changed afterwards.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._known: OrderedDict[str, Known] = OrderedDict()  # the one longest unused first
        self._gone: dict[str, Fallback] = {}  # why a call of ours is not in `_known`
        self._alias: dict[str, str] = {}  # the call that an answer was minted for -> the call that served it
        self._texts: dict[str, list[Known]] = {}  # answers that may come back without an id
        self._asked: dict[int, list[Known]] = {}  # by number of messages

    def find(self, request: ChatRequest) -> Found:
        """The call that `request` continues."""
        found = self._find(request)
        if found.parent is not None:
            self._known.move_to_end(found.parent.call_id)
            found.parent.num_found += 1
        return found

    def add(
        self,
        call: ModelCall,
        request: ChatRequest,
        rendered: bytes | Sequence[int] | None = None,
        stop_reason: str | int | None = None,
    ) -> None:
        """Remember a call that has ended; one that was not answered to its end never becomes a parent.

        `rendered`: see `Known`. `stop_reason` is the engine's word (a stop string or id) where it gave one.
        """
        minted_for = call.replayed_from or call.call_id
        if call.status != "ok" or call.answer is None or not call.completion_token_ids:
            self._gone[minted_for] = "parent_not_usable"
            return
        if call.replayed_from:
            self._alias[call.replayed_from] = call.call_id
        self._forget(call.call_id)
        parent = self._known.get(call.parent_call_id or "")
        if parent is not None:
            parent.num_continued += 1
        messages, tools, num_bytes = self._shared(parent, request)
        known = Known(
            call.call_id,
            call.prompt_token_ids,
            call.completion_token_ids,
            call.finish_reason,
            stop_reason,
            call.answer,
            messages,
            tools,
            rendered,
            call.delivered,
        )
        num_ids = (call.prompt_token_ids, call.completion_token_ids, rendered or ())
        known.num_bytes = num_bytes + _size(call.answer) + 8 * len(messages) + sum(map(_num_bytes, num_ids))
        self._known[call.call_id] = known
        self._num_bytes += known.num_bytes
        self._asked.setdefault(known.num_messages, []).append(known)
        if not known.answer.tool_calls:
            self._texts.setdefault(known.answer.text.strip(), []).append(known)
        while self._num_bytes > self._max_bytes and len(self._known) > 1:
            self._evict()

    def restore(self, calls: Iterable[tuple[ModelCall, ChatRequest]], tokenizer: str) -> None:
        """Remember stored calls, oldest first, as after a restart; `asked` makes pairs of calls.

        Ids of another tokenizer than the engine's, `tokenizer`, are not continued.
        """
        for call, request in calls:
            if call.tokenizer == tokenizer:
                # A store has no renderings; that of a call which continues none is its prompt.
                self.add(call, request, None if call.continuation == "none" else b"")
            else:
                self._gone[call.replayed_from or call.call_id] = "parent_not_usable"

    # -- finding -------------------------------------------------------------------------------------

    def _find(self, request: ChatRequest) -> Found:
        fallback: Fallback = "first_call"
        for at in range(len(request.messages) - 1, -1, -1):
            message = request.messages[at]
            if message.role == "assistant":
                if (found := self._at(at, message, request)) is not None:
                    return found
                fallback = "no_parent"
            elif message.role == "user" and message.minted_ids and fallback == "first_call":
                fallback = "compacted"
        return Found(fallback=fallback)

    def _at(self, at: int, answer: Message, request: ChatRequest) -> Found | None:
        """What the answer at `at` says about the parent; None for one that is not known to be ours."""
        if answer.minted_ids:
            call_id = call_id_of(answer.minted_ids[-1]) or ""
            call_id = self._alias.get(call_id, call_id)
            known = self._known.get(call_id)
            if known is None:
                return Found(fallback=self._gone.get(call_id, "no_parent"), named=call_id)
            return _check(known, request, at)
        same_text = self._texts.get(answer.text.strip(), [])
        checked = [_check(known, request, at) for known in same_text if known.num_messages == at]
        if fits := [found for found in checked if found.parent is not None]:
            return _choose(fits)
        if same_text:
            return _check(same_text[-1], request, at)
        for known in self._asked.get(at, ()):
            if isinstance(_history_edits(known, request, at), list):  # asked the same, it said something else
                return Found(fallback="history_edited", named=known.call_id)
        return None

    # -- memory --------------------------------------------------------------------------------------

    def _shared(self, parent: Known | None, request: ChatRequest) -> tuple[list[Message], list[Tool], int]:
        """The messages and tools of a request with those that are known already, and the bytes of the new."""
        messages, tools = request.messages, request.tools
        near = list(islice(reversed(self._known.values()), _NUM_RECENT))
        if parent is not None and parent.messages == messages[: parent.num_messages]:
            near, ours = [parent], parent.messages
        else:
            ours = max((_common(known.messages, messages) for known in near), key=len, default=[])
        new = messages[len(ours) :]
        num_bytes = sum(map(_size, new))
        shared = next((known.tools for known in near if known.tools == tools), None)
        if shared is None:
            num_bytes += sum(len(tool.description) + 1000 for tool in tools)
        return [*ours, *new], tools if shared is None else shared, num_bytes

    def _evict(self) -> None:
        """Forget a call: rather one that was continued, which only a fork needs, than a thread's last."""
        older = islice(self._known.values(), len(self._known) - 1)
        oldest = next(iter(self._known.values()))
        least = next((known for known in older if known.num_continued), oldest)
        self._forget(least.call_id)
        self._gone[least.call_id] = "parent_evicted"

    def _forget(self, call_id: str) -> None:
        known = self._known.pop(call_id, None)
        if known is None:
            return
        self._num_bytes -= known.num_bytes
        _drop(self._asked, known.num_messages, known)
        if not known.answer.tool_calls:
            _drop(self._texts, known.answer.text.strip(), known)


def asked(
    calls: Iterable[ModelCall], responses: Responses | None = None
) -> Iterator[tuple[ModelCall, ChatRequest]]:
    """Calls as read from a store, with their wire, and what they asked; without those that asked nonsense.

    A further answer to a call's request asked what that call did, which has to come before it. So has what a
    request refers to; `responses` are filled with what later ones may refer to.
    """
    several: dict[str, ChatRequest] = {}
    responses = responses or Responses()
    for call in calls:
        if call.answer_of is not None:
            if call.answer_of in several:
                yield call, several[call.answer_of]
            continue
        headers = {name.lower(): value for name, value in call.wire.request_headers}
        if call.status == "ok":
            responses.keep(call.dialect, call.wire)
        try:
            body = responses.whole(call.dialect, call.wire.request_body)
            request = DIALECTS[call.dialect].decode(body, headers, call.wire.path)
        except (PolarError, KeyError):  # or it was no call of a model
            continue
        if request.n > 1:
            several[call.call_id] = request
        yield call, request


def lineage_of(calls: Iterable[tuple[ModelCall, ChatRequest]]) -> Iterator[tuple[ModelCall, Found]]:
    """What `find` would have said to each call of a rollout as it began, in the order of their beginnings.

    A call is a possible parent from its `ended_at` on.
    """
    lineage = Lineage()
    pending: list[tuple[float, int, ModelCall, ChatRequest]] = []
    for call, request in sorted(calls, key=lambda pair: (pair[0].started_at, pair[0].seq)):
        while pending and pending[0][0] <= call.started_at:
            lineage.add(*heapq.heappop(pending)[2:])
        yield call, lineage.find(request)
        ended_at = call.started_at if call.ended_at is None else call.ended_at
        heapq.heappush(pending, (ended_at, call.seq, call, request))


def _check(known: Known, request: ChatRequest, at: int) -> Found:
    """Whether the answer at `at` and all before it are `known`'s."""
    edits = edits_between(known.answer, request.messages[at])
    before = _history_edits(known, request, at)
    if not isinstance(before, list):
        return Found(fallback=before, named=known.call_id)
    if edits is None:
        return Found(fallback="history_edited", named=known.call_id)
    every = [edit for edit in HARMLESS if edit in edits or edit in before]
    return Found(known, None, every, at + 1, known.call_id)


def _history_edits(known: Known, request: ChatRequest, at: int) -> list[Edit] | Fallback:
    """The harmless edits between what `known` was asked and the request up to `at`, or what else differs."""
    messages = request.messages
    if not _same_system(known.messages, messages):
        return "system_changed"
    if known.num_messages == at and known.tools != request.tools:
        return "tools_changed"
    if known.num_messages != at:
        return "history_edited"
    edits: list[Edit] = []
    if known.messages != messages[:at]:
        for before, now in zip(known.messages, messages, strict=False):
            more = edits_between(before, now) if before.role == "assistant" else _unchanged(before, now)
            if more is None:
                return "history_edited"
            edits += more
    return edits


def _unchanged(before: Message, now: Message) -> list[Edit] | None:
    return [] if same(before, now) else None


def _choose(fits: list[Found]) -> Found:
    """Of calls asked and answering the same: any where their ids are the same too, else the one that fits."""
    known = [(found, found.parent) for found in fits if found.parent is not None]
    if any(parent.delivered for _, parent in known):  # nobody echoes what he was not given
        known = [(found, parent) for found, parent in known if parent.delivered]
    fewest = min(len(found.edits) for found, _ in known)
    known = [(found, parent) for found, parent in known if len(found.edits) == fewest]
    first = known[0][1]
    if all(_ids(parent) == _ids(first) for _, parent in known):
        return min(known, key=lambda pair: (pair[1].num_continued, pair[1].num_found))[0]
    fresh = [found for found, parent in known if not parent.num_continued]
    return fresh[0] if len(fresh) == 1 else Found(fallback="ambiguous", named=first.call_id)


def _ids(known: Known) -> tuple[Sequence[int], list[int]]:
    return known.prompt_token_ids, known.completion_token_ids


def _same_system(before: list[Message], now: list[Message]) -> bool:
    heads = [[m.content for m in islice(ms, 1) if m.role == "system"] for ms in (before, now)]
    return heads[0] == heads[1]


def _common(known: list[Message], messages: list[Message]) -> list[Message]:
    """The longest beginning of `known` that `messages` share."""
    if known == messages[: len(known)]:  # in C
        return known
    num = next((n for n, (a, b) in enumerate(zip(known, messages, strict=False)) if a != b), len(messages))
    return known[:num]


def _drop(index: dict[Any, list[Known]], key: Any, known: Known) -> None:
    index[key].remove(known)
    if not index[key]:
        del index[key]


def _size(message: Message) -> int:
    """Roughly the bytes of a message."""
    texts = [part.url if isinstance(part, ImagePart) else part.text for part in message.content]
    texts += [message.reasoning or "", *(call.arguments for call in message.tool_calls)]
    return 500 + sum(map(len, texts))


def _num_bytes(ids: bytes | Sequence[int]) -> int:
    if isinstance(ids, TokenIds):
        return len(ids.text)
    return len(ids) if isinstance(ids, bytes) else 40 * len(ids)
