"""The ids of each call of a rollout, out of its columns: which are whole, in what order, and as one array."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from polar_mitm.columns import NO_BASE, RolloutColumns


class Tokens:
    """N calls' ids. All lists are by row of `columns`.

    A call's own ids are `suffix[suffix_at[row] : suffix_at[row + 1]]`, and likewise `completion`; both int32,
    and not copied. `num_prompt` P and `num_ids` P + C count a call's ids. `order` lists the rows whose prompt
    is whole, each after the row that it is stored on top of; the others stand on a call that is missing, too
    short, or on themselves.
    """

    def __init__(self, columns: RolloutColumns) -> None:
        self.suffix: NDArray[np.int32] = columns.suffix.values
        self.suffix_at: list[int] = columns.suffix.offsets.tolist()
        self.completion: NDArray[np.int32] = columns.completion.values
        self.completion_at: list[int] = columns.completion.offsets.tolist()
        num_prompt = columns.shared + columns.suffix.lengths
        self.shared: list[int] = columns.shared.tolist()
        self.num_prompt: list[int] = num_prompt.tolist()
        self.num_ids: list[int] = (num_prompt + columns.completion.lengths).tolist()
        self.base: list[int] = columns.base.tolist()
        self.order = self._order()

    def _order(self) -> list[int]:
        on_top: dict[int, list[int]] = {}
        for row, base in enumerate(self.base):
            if 0 <= self.shared[row] <= (self.num_ids[base] if base >= 0 else 0):
                on_top.setdefault(base, []).append(row)
        order = on_top.get(NO_BASE, [])
        for base in order:
            order += on_top.get(base, ())
        return order

    def ids(self, row: int) -> NDArray[np.int32]:
        """[P + C] prompt and completion of a call whose prompt is whole."""
        end = self.num_ids[row]
        out = np.empty(end, dtype=np.int32)
        while end:
            num_prompt, shared = self.num_prompt[row], self.shared[row]
            if end > num_prompt:
                at = self.completion_at[row]
                out[num_prompt:end] = self.completion[at : at + end - num_prompt]
                end = num_prompt
            if end > shared:
                at = self.suffix_at[row]
                out[shared:end] = self.suffix[at : at + end - shared]
                end = shared
            row = self.base[row]
        return out
