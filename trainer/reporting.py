"""Curves for people: TensorBoard events as a run goes, and a PNG. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Series = tuple[Sequence[int], Sequence[float]]
_WINDOW = 5


class Board:
    """TensorBoard event files in a folder; a figure's name up to its first / is its section."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder))

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the figures of a step, those that are numbers."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def draw(path: Path, curves: Mapping[str, Series], *, title: str, label: str = "mean reward") -> None:
    """A PNG of some curves over steps; each with its moving mean where it is long enough for one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in curves.items():
        if len(steps) > 2 * _WINDOW:
            (line,) = axes.plot(steps, values, linewidth=0.8, alpha=0.4)
            axes.plot(steps, moving_mean(values), color=line.get_color(), label=f"{name} (mean of {_WINDOW})")
        elif steps:
            axes.plot(steps, values, marker="o", markersize=4, label=name)
    axes.set(title=title, xlabel="optimiser step", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def moving_mean(values: Sequence[float]) -> list[float]:
    """[N] the mean of each value and up to four before it."""
    return [
        math.fsum(values[max(0, at - _WINDOW + 1) : at + 1]) / min(at + 1, _WINDOW)
        for at in range(len(values))
    ]
