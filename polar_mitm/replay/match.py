"""Which recorded call a live request is."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from polar_mitm.dialects.ids import call_id_of
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.responses_state import Responses
from polar_mitm.dialects.roles import caller
from polar_mitm.errors import PolarError
from polar_mitm.replay.compare import Divergence, differences
from polar_mitm.replay.normalise import Normal, normalise
from polar_mitm.replay.rules import RULES, Rule
from polar_mitm.types import ModelCall, Wire


class Asked(NamedTuple):
    """What has to be equal for a recorded answer to be an answer at all: the same kind of call, in the same
    wire format, at the same place of the conversation.

    `echoed` are the calls whose answers are in the history.
    """

    dialect: str
    method: str
    path: str
    role: str
    model: str
    stream: bool
    echoed: frozenset[str]


class Match(NamedTuple):
    """A live request and the recorded call that it is; `call` is None where it is none of those that wait.

    `nearest` is then the next one at the same endpoint; `divergences` are from either.
    """

    call: ModelCall | None
    nearest: ModelCall | None
    divergences: list[Divergence]
    rules: list[str]
    again: str | None = None
    """A call that was served already and asked exactly this."""


class Recording:
    """The recorded calls that still wait for their request. Each is taken once, with its further answers."""

    def __init__(self, calls: Iterable[ModelCall], rules: Sequence[Rule] = RULES) -> None:
        self.rules = rules
        self.calls: list[ModelCall] = []
        self.others: dict[str, list[ModelCall]] = defaultdict(list)
        for call in sorted(calls, key=lambda call: (call.seq, call.call_id)):
            (self.others[call.answer_of] if call.answer_of else self.calls).append(call)
        self.waiting = {call.call_id: call for call in self.calls}
        self._digests: dict[str, bytes] = {}
        self._served: dict[bytes, str] = {}
        self._groups: dict[Asked, list[ModelCall]] = defaultdict(list)
        self._responses = Responses()
        for call in self.calls:
            if call.status == "ok":
                self._responses.keep(call.dialect, call.wire)
            self._groups[asked(call.dialect, call.wire, self._responses)].append(call)

    def match(self, dialect: str, wire: Wire) -> Match:
        """The recorded call that a request is: the one that asked exactly this, else the one that differs in
        the fewest fields; the earliest of several."""
        normal = normalise(wire, self.rules)
        digest, what = _digest(normal), asked(dialect, wire, self._responses)
        found = [call for call in self._groups.get(what, []) if call.call_id in self.waiting]
        for call in found:
            if self._digest_of(call) == digest:
                return Match(call, None, [], normal.rules)
        by_distance = [(self._differences(call, normal), call) for call in found]
        if by_distance:
            divergences, call = min(by_distance, key=lambda each: len(each[0]))
            return Match(call, None, divergences, normal.rules)
        near = (c for c in self.waiting.values() if (c.dialect, _path(c.wire)) == (dialect, what.path))
        nearest = next(near, None)
        divergences = self._differences(nearest, normal) if nearest else []
        return Match(None, nearest, divergences, normal.rules, self._served.get(digest))

    def take(self, call: ModelCall) -> None:
        """The call is served: it waits no longer."""
        del self.waiting[call.call_id]
        self._served[self._digest_of(call)] = call.call_id

    def _digest_of(self, call: ModelCall) -> bytes:
        if call.call_id not in self._digests:
            self._digests[call.call_id] = _digest(normalise(call.wire, self.rules))
        return self._digests[call.call_id]

    def _differences(self, call: ModelCall, normal: Normal) -> list[Divergence]:
        return list(differences(normalise(call.wire, self.rules).tree, normal.tree))


def asked(dialect: str, wire: Wire, responses: Responses) -> Asked:
    """See `Asked`. A request that its dialect cannot read has no model and no history.

    `responses` are what it may refer to.
    """
    headers = {name.lower(): value for name, value in wire.request_headers}
    known = DIALECTS[dialect]
    try:
        request = known.decode(responses.whole(dialect, wire.request_body), headers, wire.path)
    except PolarError:
        return Asked(dialect, wire.method, _path(wire), "main", "", False, frozenset())
    echoed = {call_id_of(each) for message in request.messages for each in message.minted_ids} - {None}
    role = caller(headers, request).role
    return Asked(
        dialect,
        wire.method,
        _path(wire),
        role,
        request.model,
        request.stream,
        frozenset(filter(None, echoed)),
    )


def _path(wire: Wire) -> str:
    return wire.path.partition("?")[0]


def _digest(normal: Normal) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(normal.tree), digest_size=16).digest()
