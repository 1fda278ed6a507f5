"""The trie: nodes are sequences of ids, nothing shared is read twice, climbing is short."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from polar_mitm.reconstruct import trie as trie_module
from polar_mitm.reconstruct.trie import ROOT, Trie


def test_a_node_is_a_sequence_of_ids_whatever_is_inserted_later() -> None:
    rng = random.Random(1)
    flat = np.array([rng.randrange(3) for _ in range(4000)], dtype=np.int32)
    trie, ids_of = Trie(), {ROOT: ()}
    node_of: dict[tuple[int, ...], int] = {(): ROOT}
    for start in range(0, 4000, 8):
        under = rng.choice(list(ids_of))
        depth = rng.randint(0, len(ids_of[under]))
        above, ids = trie.above(under, depth), ids_of[under][:depth]
        assert node_of.setdefault(ids, above) == above and trie.depth[above] == depth
        ids_of[above] = ids
        end = start + rng.randint(0, 8)
        node, ids = trie.insert(above, flat, start, end), (*ids, *flat[start:end].tolist())
        assert node_of.setdefault(ids, node) == node and trie.depth[node] == len(ids)
        ids_of[node] = ids
    for node, ids in ids_of.items():
        if node != ROOT:
            parent = trie.parent[node]
            assert trie.depth[parent] < len(ids)
            assert trie.above(node, trie.depth[parent]) == parent


def test_each_id_is_compared_once_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = trie_module._common
    monkeypatch.setattr(trie_module, "_common", lambda *a: compared.append(original(*a)) or compared[-1])
    rng = random.Random(2)
    flat = np.array([rng.randrange(2) for _ in range(3000)], dtype=np.int32)
    trie, tip = Trie(), ROOT
    for start in range(0, 3000, 10):
        before = len(compared)
        under = trie.above(tip, rng.randint(0, trie.depth[tip]))
        tip = trie.insert(under, flat, start, start + 10)
        assert sum(compared[before:]) <= 10
    assert trie.depth[tip] >= 10


def test_climbing_takes_logarithmically_many_steps() -> None:
    class Counting(list[int]):
        num_read = 0

        def __getitem__(self, index: Any) -> Any:
            Counting.num_read += 1
            return super().__getitem__(index)

    flat = np.arange(1 << 13, dtype=np.int32)
    trie, node = Trie(), ROOT
    for start in range(1 << 13):
        node = trie.insert(node, flat, start, start + 1)
    trie.parent, trie._jump = Counting(trie.parent), Counting(trie._jump)
    for depth in (0, 1, 5, 1000, 4095, 4096, 8000):
        Counting.num_read = 0
        assert trie.depth[trie.above(node, depth)] == depth
        assert Counting.num_read < 100, "of 8192 nodes"
