"""Which call continues which: the ids decide.

The parent of a call is the call whose cumulative ids (prompt + completion) are the longest proper prefix of
its prompt. Recorded lineage only chooses between calls whose cumulative ids are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from polar_mitm.types import ModelCall

_ROOT_ROLES = ("auxiliary", "compaction")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd; collisions cost a comparison, never a wrong parent


@dataclass(slots=True, eq=False)
class Node:
    """A call in the forest. `ids` [P + C] are its cumulative ids, `logprobs` [C] its behaviour logprobs."""

    call: ModelCall
    ids: NDArray[np.int32]
    num_prompt: int
    logprobs: NDArray[np.float32]
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    orphan: bool = False

    @property
    def order(self) -> tuple[float, str]:
        """The stable order of calls: by start, then by id."""
        return self.call.started_at, self.call.call_id

    def path(self) -> list[Node]:
        """The nodes from the root to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]


def link(nodes: Sequence[Node]) -> None:
    """Set the parent and the children of each node.

    Auxiliary calls and compactions stay alone. Each prompt is read once: its rolling hash (mod 2^64) at the
    lengths of all cumulative ids names the candidates, and ids are compared for the longest ones only.
    """
    tree = sorted((n for n in nodes if n.call.role not in _ROOT_ROLES), key=lambda n: (n.ids.size, n.order))
    if not tree:
        return
    powers = np.full(tree[-1].ids.size, _MULTIPLIER).cumprod(dtype=np.uint64)
    lengths = np.array([n.ids.size for n in tree])
    hashes = np.array([_terms(n.ids, powers).sum() for n in tree], dtype=np.uint64)
    for node in sorted(tree, key=lambda n: n.order):
        rolling = _terms(node.ids[: node.num_prompt], powers).cumsum()
        num_shorter = int(np.searchsorted(lengths, node.num_prompt))
        hits = np.flatnonzero(rolling[lengths[:num_shorter] - 1] == hashes[:num_shorter])
        longest: list[Node] = []
        for candidate in (tree[i] for i in hits[::-1]):
            if longest and candidate.ids.size < longest[0].ids.size:
                break
            if np.array_equal(candidate.ids, node.ids[: candidate.ids.size]):
                longest.append(candidate)
        if longest:
            named = node.call.parent_call_id
            node.parent = min(longest, key=lambda n: (n.call.call_id != named, not n.call.delivered, n.order))
            node.parent.children.append(node)


def _terms(ids: NDArray[np.int32], powers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return ids.astype(np.uint64) * powers[: ids.size]


def mark_orphans(nodes: Sequence[Node]) -> None:
    """Among calls of one role with identical prompts, mark those that did not live on.

    Alive are the extended ones; where none was, the delivered ones; where none was either, the last one
    started, since each retry gave up on the answer before it. A call with a prompt of its own is alive.
    """
    siblings: dict[tuple[str, bytes], list[Node]] = {}
    for node in nodes:
        digest = hashlib.sha256(node.ids[: node.num_prompt].tobytes()).digest()
        siblings.setdefault((node.call.role, digest), []).append(node)
    for group in siblings.values():
        alive = (
            [n for n in group if n.children]
            or [n for n in group if n.call.delivered]
            or [max(group, key=lambda n: n.order)]
        )
        for node in group:
            node.orphan = node not in alive
