"""A radix trie over token ids whose edges are slices of one array, so that no token is copied.

Each node ends an edge and stands for all ids from the root to that end. Work is linear in the ids that are
inserted; what a call shares with the one it is stored on top of is skipped, not read again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROOT = 0


class Trie:
    """Nodes are numbers, 0 the root. `depth[node]` counts the ids from the root, `parent[node]` is the node
    above. Where an edge is split, the new node is the upper one: a node keeps the ids that it stands for.
    """

    def __init__(self, flat: NDArray[np.int32]) -> None:
        self._flat = flat
        self.parent = [-1]
        self.depth = [0]
        self._start = [0]  # of the node's edge in `flat`
        self._level = [0]
        self._jump = [ROOT]  # some node above, so chosen that climbing takes logarithmic time
        self._child: dict[tuple[int, int], int] = {}  # by the upper node and the first id of the edge

    def insert(self, node: int, start: int, end: int) -> int:
        """The node for `node`'s ids and then `flat[start:end]`."""
        flat = self._flat
        while start < end:
            key = node, int(flat[start])
            child = self._child.get(key)
            if child is None:
                child = self._add(node, self.depth[node] + end - start, start)
                self._child[key] = child
                return child
            length = self.depth[child] - self.depth[node]
            shared = _common(flat, self._start[child], start, min(length, end - start))
            if shared < length:
                child = self._split(child, self.depth[node] + shared)
            node = child
            start += shared
        return node

    def above(self, node: int, depth: int) -> int:
        """The node for the first `depth` ids of `node`'s. `depth` must not be beyond `node`'s own."""
        depths, parent, jump = self.depth, self.parent, self._jump
        while depths[node] > depth:
            if depths[jump[node]] >= depth:
                node = jump[node]
            elif depths[parent[node]] >= depth:
                node = parent[node]
            else:
                return self._split(node, depth)
        return node

    def _add(self, parent: int, depth: int, start: int) -> int:
        jump = self._jump[parent]
        far = self._jump[jump]
        level = self._level
        # Skew-binary jumps: twice as far wherever the two jumps before were equally long.
        self._jump.append(far if level[parent] - level[jump] == level[jump] - level[far] else parent)
        level.append(level[parent] + 1)
        self.parent.append(parent)
        self.depth.append(depth)
        self._start.append(start)
        return len(self.parent) - 1

    def _split(self, child: int, depth: int) -> int:
        """A new node at `depth`, inside the edge that ends at `child`."""
        parent, start = self.parent[child], self._start[child]
        middle = self._add(parent, depth, start)
        below = start + depth - self.depth[parent]
        self._child[parent, int(self._flat[start])] = middle
        self._child[middle, int(self._flat[below])] = child
        self.parent[child] = middle
        self._start[child] = below
        return middle


def _common(flat: NDArray[np.int32], a: int, b: int, length: int) -> int:
    """How many of the `length` ids at `a` and at `b` are equal before the first that is not."""
    differ = flat[a : a + length] != flat[b : b + length]
    first = int(differ.argmax())
    return first if differ[first] else length
