"""Numbers that add up over micro-batches and ranks, and the means that they come to.

A metric is a sum over tokens; one whose name ends in `_max` is a maximum, what begins with `num_` a count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def is_maximum(name: str) -> bool:
    """Do values of this metric combine by their maximum? All others are added."""
    return name.endswith("_max")


def combine(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of all `parts` together. What only some parts hold counts where it is."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            known = total.get(name)
            both = torch.maximum if is_maximum(name) else torch.add
            total[name] = value if known is None else both(known, value)
    return total


def means(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """For people: sums divided by `num_tokens`, maxima and counts as they are."""
    num_tokens = max(float(metrics["num_tokens"]), 1.0)
    return {
        name: float(value) / (1.0 if is_maximum(name) or name.startswith("num_") else num_tokens)
        for name, value in metrics.items()
    }
