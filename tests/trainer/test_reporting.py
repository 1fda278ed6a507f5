"""Curves: what TensorBoard reads back, and a picture; without torch."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from polar_mitm_trainer.reporting import Board, draw, moving_mean


def test_tensorboard_reads_the_figures(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.add(1, {"train/reward": 0.25, "train/odd": math.nan})
    board.add(2, {"train/reward": 0.5})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["tensors"] == ["train/reward"]
    points = [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors("train/reward")]
    assert points == [(1, 0.25), (2, 0.5)]


@pytest.mark.parametrize("num_steps", [0, 1, 40])
def test_a_picture(tmp_path: Path, num_steps: int) -> None:
    steps = list(range(num_steps))
    path = tmp_path / "reward.png"
    draw(path, {"train": (steps, [s / 40 for s in steps]), "held out": ([0, 40], [0.4, 0.9])}, title="a run")
    pixels = imread(path)
    assert pixels.shape[0] > 300 and pixels.std() > 0.01
    assert [each.name for each in tmp_path.iterdir()] == ["reward.png"]


def test_moving_mean() -> None:
    assert moving_mean([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]


def test_what_needs_no_torch_does_not_load_it() -> None:
    code = (
        "import sys, polar_mitm_trainer.worker, polar_mitm_trainer.rundb, polar_mitm_trainer.config\n"
        "from polar_mitm_trainer.reporting import Board, draw\n"
        "import tensorboard.summary, matplotlib.figure\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
