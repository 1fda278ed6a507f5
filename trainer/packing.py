"""Samples to micro-batches: sequences without padding, and what several of them begin with only once.

Sorted by their token ids, samples that begin alike are neighbours. So the sorted samples one after another,
each without what it shares with the one before it, are their trie in depth-first order, and forks lie where a
sample leaves its neighbour's path. A sample's token t is predicted by the hidden state at t - 1. Nothing from
its last trained token on is laid out, for no loss sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polar_mitm_trainer.microbatch import MicroBatch, Node
from polar_mitm_trainer.samples import Sample

# A fork costs every token behind it another pass over its output in every layer. For fewer tokens than these,
# computing them once more in each branch is cheaper.
_WORTH_A_FORK = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """A sample cut behind the last position that predicts, its trained positions, and what it shares.

    `index` among the samples given; `ids` [L]; `trained` [m], positions of the trained tokens, ascending;
    `shared` tokens at its beginning are its neighbour's.
    """

    index: int
    ids: NDArray[np.int32]
    trained: NDArray[np.int64]
    shared: int


def pack(samples: Sequence[Sample], *, max_tokens: int, tree: bool) -> Iterator[MicroBatch]:
    """Micro-batches of at most `max_tokens` laid-out tokens that hold every trained token of `samples` once.

    With `tree`, samples that begin alike come together and share those tokens, whichever order they came in;
    micro-batches are cut where the least is shared. Without, each sample is a root, in the order given.
    Samples without a trained token are in no micro-batch. The same samples give the same micro-batches.

    Raises:
        ValueError: a sample that alone exceeds `max_tokens`; one whose first token trains, which nothing
            predicts.
    """
    laid = [_cut(index, sample, max_tokens) for index, sample in enumerate(samples) if sample.num_trained]
    if tree:
        laid = _share(laid)
    for first, last in _bins(laid, max_tokens):
        yield _lay_out(samples, laid[first:last])


def _cut(index: int, sample: Sample, max_tokens: int) -> _Laid:
    trained = np.flatnonzero(sample.loss_mask)
    if trained[0] == 0:
        raise ValueError(f"{sample.trajectory_id}: its first token is to train, but nothing comes before it")
    if trained[-1] > max_tokens:
        raise ValueError(
            f"{sample.trajectory_id}: {trained[-1]} tokens in one sequence, but a micro-batch takes "
            f"{max_tokens}: raise packing.max_tokens, or leave such long trajectories out"
        )
    return _Laid(index, sample.token_ids[: trained[-1]], trained, 0)


def _share(laid: list[_Laid]) -> list[_Laid]:
    """Sorted by their ids, each with how many tokens it shares with the one before it."""
    laid = sorted(laid, key=lambda each: each.ids.astype(">u4").tobytes())
    shared = [0] * len(laid)
    forks = _Forks()
    for at, each in enumerate(laid):
        if at:
            shared[at] = forks.worth(_common(laid[at - 1].ids, each.ids))
        forks.add(shared[at], each.ids.size)
    return [_Laid(e.index, e.ids, e.trained, n) for e, n in zip(laid, shared, strict=True)]


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    most = min(a.size, b.size)
    differs = a[:most] != b[:most]
    first = int(differs.argmax()) if most else 0
    return first if most and differs[first] else most


def _bins(laid: list[_Laid], max_tokens: int) -> list[tuple[int, int]]:
    """Ranges of neighbours that fit, cut so that the fewest tokens are laid out, then the fewest ranges."""
    # Of the first n samples: tokens laid out twice, ranges, and where the last of these begins.
    best = [(0, 0, 0)]
    for end in range(1, len(laid) + 1):
        inside, choices = 0, []
        for first in range(end - 1, -1, -1):
            if inside + laid[first].ids.size > max_tokens:
                break  # from further left it is no shorter: what the later ones share came from their left
            lost, num, _ = best[first]
            choices.append((lost + laid[first].shared, num + 1, first))
            inside += laid[first].ids.size - laid[first].shared
        best.append(min(choices))
    ranges: list[tuple[int, int]] = []
    end = len(laid)
    while end:
        ranges.append((best[end][2], end))
        end = best[end][2]
    return ranges[::-1]


class _Forks:
    """The nodes of a trie whose sequences come in sorted order, laid out one after another."""

    def __init__(self) -> None:
        self._open: list[list[int]] = []  # start, end and first depth of the nodes on the last one's path
        self._nodes: list[Node] = []
        self._size = 0

    def worth(self, shared: int) -> int:
        """`shared`, or less where the fork that it needs saves too little."""
        for start, end, depth in reversed(self._open):
            if depth < shared:
                splits = shared < depth + end - start
                return depth if splits and shared - depth < _WORTH_A_FORK else shared
        return shared

    def add(self, shared: int, size: int) -> None:
        """A sequence of `size` tokens of which the first `shared` are those of the one before it."""
        if shared == size:
            return
        while self._open and self._open[-1][2] >= shared:
            self._close()
        start = self._size
        self._size += size - shared
        if self._open:
            top = self._open[-1]
            fork = top[0] + shared - top[2]
            if fork < top[1]:
                self._nodes.append(Node(fork, top[1], start))
                top[1] = fork
            elif fork == start:  # the one before ends here and nothing forks: the same node goes on
                top[1] = self._size
                return
        self._open.append([start, self._size, shared])

    def nodes(self) -> tuple[Node, ...]:
        while self._open:
            self._close()
        return tuple(sorted(self._nodes, key=lambda node: node.start))

    def _close(self) -> None:
        start, end, _ = self._open.pop()
        self._nodes.append(Node(start, end, self._size))


def _lay_out(samples: Sequence[Sample], laid: list[_Laid]) -> MicroBatch:
    forks = _Forks()
    ids, positions, sources = [], [], []
    path = np.zeros(0, dtype=np.int64)  # where the tokens of the sequence before lie
    size = 0
    for at, each in enumerate(laid):
        shared = each.shared if at else 0
        forks.add(shared, each.ids.size)
        own = each.ids.size - shared
        path = np.concatenate([path[:shared], np.arange(size, size + own)])
        size += own
        ids.append(each.ids[shared:])
        positions.append(np.arange(shared, each.ids.size))
        sources.append(path[each.trained - 1])

    def trained(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(samples[e.index], name)[e.trained] for e in laid]))

    counts = [e.trained.size for e in laid]
    return MicroBatch(
        token_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        nodes=forks.nodes(),
        sources=torch.from_numpy(np.concatenate(sources)),
        targets=trained("token_ids").long(),
        samples=torch.from_numpy(np.repeat(np.arange(len(laid)), counts)),
        behaviour_logprobs=trained("behaviour_logprobs"),
        advantages=trained("advantages"),
        weights=trained("weights"),
        num_samples=len(laid),
        num_unpacked=sum(e.ids.size for e in laid),
        sample_indices=tuple(e.index for e in laid),
    )
