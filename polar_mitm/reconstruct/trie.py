"""A radix trie over token ids whose edges are slices of the callers' arrays: no token is copied.

Each node ends an edge and stands for all ids from the root to that end. Work is linear in the ids that are
inserted; what a call shares with the one it is stored on top of is skipped, not read again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROOT = 0
_Ids = NDArray[np.int32]


class Trie:
    """Nodes are numbers, 0 the root. `depth[node]` counts the ids from the root, `parent[node]` is the node
    above. Where an edge is split, the new node is the upper one: a node keeps the ids that it stands for.
    """

    def __init__(self) -> None:
        self.parent = [-1]
        self.depth = [0]
        self._ids: list[_Ids] = [np.empty(0, np.int32)]  # where the ids of the node's edge lie
        self._start = [0]  # ... and from where on
        self._level = [0]
        self._jump = [ROOT]  # some node above, so chosen that climbing takes logarithmic time
        self._child: dict[tuple[int, int], int] = {}  # by the upper node and the first id of the edge

    def insert(self, node: int, ids: _Ids, start: int, end: int) -> int:
        """The node for `node`'s ids and then `ids[start:end]`."""
        while start < end:
            key = node, int(ids[start])
            child = self._child.get(key)
            if child is None:
                child = self._add(node, self.depth[node] + end - start, ids, start)
                self._child[key] = child
                return child
            length = self.depth[child] - self.depth[node]
            first, most = self._start[child], min(length, end - start)
            shared = _common(self._ids[child][first : first + most], ids[start : start + most])
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

    def _add(self, parent: int, depth: int, ids: _Ids, start: int) -> int:
        jump = self._jump[parent]
        far = self._jump[jump]
        level = self._level
        # Skew-binary jumps: twice as far wherever the two jumps before were equally long.
        self._jump.append(far if level[parent] - level[jump] == level[jump] - level[far] else parent)
        level.append(level[parent] + 1)
        self.parent.append(parent)
        self.depth.append(depth)
        self._ids.append(ids)
        self._start.append(start)
        return len(self.parent) - 1

    def _split(self, child: int, depth: int) -> int:
        """A new node at `depth`, inside the edge that ends at `child`."""
        parent, ids, start = self.parent[child], self._ids[child], self._start[child]
        middle = self._add(parent, depth, ids, start)
        below = start + depth - self.depth[parent]
        self._child[parent, int(ids[start])] = middle
        self._child[middle, int(ids[below])] = child
        self.parent[child] = middle
        self._start[child] = below
        return middle


def _common(a: _Ids, b: _Ids) -> int:
    """How many ids of two equally long arrays are equal before the first that is not."""
    differ = a != b
    first = int(differ.argmax())
    return first if differ[first] else a.size
