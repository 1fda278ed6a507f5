"""From the forest to trajectories: each sampled token trains in one of them at most.

A path from a root to a leaf becomes one sample, or several where it is too long: each has its whole context,
id for id, and adds the calls that it is the place of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from polar_mitm.columns import RolloutColumns
from polar_mitm.reconstruct.assemble import Piece, assemble
from polar_mitm.reconstruct.forest import NO_PARENT
from polar_mitm.reconstruct.records import MaskReason, Trajectory
from polar_mitm.reconstruct.tokens import Tokens


class Samples(Sequence[Trajectory]):
    """Trajectories that are assembled each time they are asked for: branches of a rollout share most of
    their tokens, and all of them at once may be many times as large as the calls.
    """

    def __init__(
        self,
        columns: RolloutColumns,
        tokens: Tokens,
        parent: Sequence[int],
        masked: dict[int, MaskReason],
        group_id: str | None,
    ) -> None:
        self._columns = columns
        self._tokens = tokens
        self._parent = parent
        self._group_id = group_id
        self.masked = masked
        self._last: list[int] = []  # by sample: its last call
        self.place: dict[int, int] = {}  # row to the sample that it belongs to

    def add(self, leaf: int, max_tokens: int | None) -> None:
        """Cut the path to `leaf` into samples, as far as no sample before has it.

        A call that alone is longer than `max_tokens` becomes a sample in which it is masked.
        """
        own, row = [], leaf
        while row != NO_PARENT and row not in self.place:
            own.append(row)
            row = self._parent[row]
        size = 0
        for row in reversed(own):
            added = self._tokens.num_ids[row] - self._begin(row)
            if size and max_tokens is not None and size + added > max_tokens:
                self._last.append(self._parent[row])
                size = 0
            if max_tokens is not None and added > max_tokens:
                self.masked.setdefault(row, "overlong")
            size += added
            self.place[row] = len(self._last)
        self._last.append(leaf)

    def _begin(self, row: int) -> int:
        parent = self._parent[row]
        return 0 if parent == NO_PARENT else self._tokens.num_ids[parent]

    def __len__(self) -> int:
        return len(self._last)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        found = range(len(self._last))[index]
        return self._at(found) if isinstance(found, int) else [self._at(i) for i in found]

    def __iter__(self) -> Iterator[Trajectory]:
        return map(self._at, range(len(self._last)))

    def _at(self, index: int) -> Trajectory:
        tokens = self._tokens
        row = last = self._last[index]
        pieces: list[Piece] = []
        while row != NO_PARENT:
            reason = self.masked.get(row)
            if reason is None and self.place[row] != index:
                reason = "shared_prefix"
            pieces.append((row, tokens.num_prompt[row], tokens.num_ids[row], reason))
            row = self._parent[row]
        return assemble(self._columns, tokens.ids(last), pieces[::-1], self._group_id)
