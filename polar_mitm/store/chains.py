"""Which earlier call of its rollout a call is stored on top of, and whole prompts out of such chains.

A prompt is stored as `parent's (prompt + completion)[:shared] + suffix`. This is a matter of storage, decided
by token ids alone; what a call continues is decided in reconstruction.

While recording, ids are compared as text (`12,7,9`): a list of Python ints becomes text twice as fast as it
becomes an array, and text is what a commit stores.
"""

from __future__ import annotations

import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from polar_mitm.errors import StoreError
from polar_mitm.store.bodies import NO_BASE, Base
from polar_mitm.token_ids import TokenIds

_MAX_TIPS = 16
_MAX_BYTES = 128 << 20
_COMMA = b","[0]


def ids_text(ids: Sequence[int]) -> bytes:
    """Token ids as comma-separated text."""
    return ids.text if isinstance(ids, TokenIds) else msgspec.json.encode(ids)[1:-1]


def checked(text: bytes) -> bytes:
    """Ids as text, each one that INTEGER can hold.

    Raises:
        OverflowError: one that it cannot.
    """
    array.array("i", msgspec.json.decode(b"[%b]" % text, type=list[int]))
    return text


@dataclass(slots=True)
class Tip:
    """A call that later ones may be stored on top of: its prompt and completion, and its bodies as stored.

    `hops` counts the calls that its bodies need to be unpacked.
    """

    call_id: str
    text: bytes
    num_ids: int
    request: Base = NO_BASE
    upstream: Base = NO_BASE
    hops: int = 0

    @property
    def num_bytes(self) -> int:
        return len(self.text) + len(self.request.body) + len(self.upstream.body)


class Tips:
    """The recent ends of every rollout's chains, bounded in number and bytes.

    A call that extends another in full replaces it: no prompt shares more with the shorter of the two.
    """

    def __init__(self) -> None:
        self._rollouts: OrderedDict[str, list[Tip]] = OrderedDict()
        self._num_bytes = 0

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._rollouts

    def best(self, rollout_id: str, text: bytes) -> tuple[Tip | None, int]:
        """The tip with the longest common prefix with the ids in `text`, the newest where equal, and that
        prefix's length in bytes. A rollout whose prompts share nothing gives its newest tip and 0.
        """
        tips = self._rollouts.get(rollout_id, [])
        best, shared = (tips[-1] if tips else None), 0
        for tip in reversed(tips):
            if len(tip.text) > shared < len(text) and tip.text[shared] == text[shared]:
                length = common_prefix(tip.text, text)
                if length > shared:
                    best, shared = tip, length
        return best, shared

    def add(self, rollout_id: str, tip: Tip) -> None:
        """Make `tip` the newest of its rollout."""
        tips = self._rollouts.setdefault(rollout_id, [])
        self._rollouts.move_to_end(rollout_id)
        parent, shared = self.best(rollout_id, tip.text)
        if parent and shared == len(parent.text):
            tips.remove(parent)
            self._num_bytes -= parent.num_bytes
        tips.append(tip)
        self._num_bytes += tip.num_bytes
        if len(tips) > _MAX_TIPS:
            self._num_bytes -= tips.pop(0).num_bytes
        while self._num_bytes > _MAX_BYTES and len(self._rollouts) > 1:
            _, dropped = self._rollouts.popitem(last=False)
            self._num_bytes -= sum(t.num_bytes for t in dropped)

    def restore(self, rollout_id: str, tips: list[Tip]) -> None:
        """Begin a rollout with what an earlier process, or an evicted entry, knew of it."""
        self._rollouts.setdefault(rollout_id, [])
        for tip in tips:
            self.add(rollout_id, tip)

    def clear(self) -> None:
        self._rollouts.clear()
        self._num_bytes = 0


@dataclass(slots=True)
class Link:
    """One call's tokens as stored. `num_records` of them claim to be this call."""

    parent_id: str | None
    shared: int
    suffix: list[int]
    completion: list[int]
    logprobs: list[float]
    num_records: int = 1


def common_prefix(a: bytes, b: bytes) -> int:
    """The bytes of the leading ids that two texts share, the comma after them left out."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        shared = n
    else:
        shared = int((np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)).argmax())
    if all(shared == len(text) or text[shared] == _COMMA for text in (a, b)):
        return shared
    return max(a.rfind(b",", 0, shared), 0)


def num_ids(text: bytes) -> int:
    """How many ids a text holds."""
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == _COMMA)) + 1 if text else 0


def whole_prompt(call_id: str, links: Mapping[str, Link], done: dict[str, list[int]]) -> list[int]:
    """The prompt [P] of a call; `done` keeps the prompts met on the way for the next call.

    `links` holds the call and everything that it is stored on top of.

    Raises:
        StoreError: the store has lost some of it; the message names the call.
    """
    chain: list[str] = []
    node = call_id
    while node not in done:
        link = links.get(node)
        if link is None or len(chain) > len(links):
            raise StoreError(f"call {call_id} has no prompt: call {node}, on top of which it is, is lost")
        if link.num_records > 1:
            raise StoreError(f"call {call_id} has no prompt: {link.num_records} records claim to be {node}")
        chain.append(node)
        if link.parent_id is None:
            break
        node = link.parent_id
    for node in reversed(chain):
        link = links[node]
        if link.parent_id is None:
            done[node] = link.suffix
            continue
        prompt = done[link.parent_id]
        head = prompt[: link.shared]
        head += links[link.parent_id].completion[: link.shared - len(head)]
        if len(head) != link.shared:
            raise StoreError(f"call {call_id} has no prompt: call {link.parent_id} is shorter than it was")
        done[node] = head + link.suffix
    return done[call_id]
