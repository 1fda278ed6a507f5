"""What merging a rollout's calls into trajectories saves a trainer: an ablation after Polar (2605.24220).

    python -m tests.bench.bench_merging --model DIR --tasks TASKS.py [--harness pi] [--num-tasks 32]
    python -m tests.bench.bench_merging --model DIR --store RUNS.duckdb   # rollouts that are there already

The same recorded rollouts, with the same rewards, are trained on twice from the same weights: one sample per
call (`per-request`), and one per path of exact prefixes (`forest`, without and with prefix-tree packing). An
update takes `--samples-per-update` samples, whatever they are. Told per side: samples, updates, tokens laid
out, seconds; and with --tasks the reward on held-out tasks, through the harness, on an engine with the
weights that came out. Rollouts without --store are recorded first, on the engine with DIR.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from polar_mitm import engine
from polar_mitm.cli.output import print_table
from polar_mitm.cli.trajectories import write_trajectories
from polar_mitm.store import open_reader
from polar_mitm_trainer.config import LossConfig, OptimiserConfig, PackingConfig, PolicyConfig, TrainConfig
from polar_mitm_trainer.data import TrainingSet, resolve_query, samples_of, select
from polar_mitm_trainer.learner import Learner
from polar_mitm_trainer.listing import unbuilt
from polar_mitm_trainer.samples import Sample, weigh
from tests.support.record_fixtures import POLAR_MITM

SIDES = (("per-request", False), ("forest", False), ("forest", True))


@dataclass
class Row:
    """One side. `laid_out` counts tokens that went through the model, over all updates."""

    builder: str
    tree: bool
    samples: int
    trained: int
    updates: int
    laid_out: int
    seconds: float
    reward: float | None = None


def samples(store: Path, builder: str, config: TrainConfig) -> list[Sample]:
    """Everything that can be learned from, in one step."""
    with open_reader(store) as reader:
        snapshot = select(reader, resolve_query("all", builder=builder), builder=builder)
        groups = TrainingSet(reader, snapshot, config, groups_per_step=1 << 30)
        return [each for step in groups.steps() for each in samples_of(step.rollouts, config)[0]]


def train(given: list[Sample], config: TrainConfig, per_update: int, out: Path) -> tuple[int, int, float]:
    """Updates, tokens laid out, seconds."""
    learner = Learner(config)
    parts = [given[n : n + per_update] for n in range(0, len(given), per_update)]
    laid_out, began = 0, time.monotonic()
    for part in parts:
        laid_out += int(learner.step(weigh(part, "token"))["num_laid_out"])
    seconds = time.monotonic() - began
    learner.export(out)
    return len(parts), laid_out, seconds


def collected(model: Path, store: Path, options: argparse.Namespace, *more: object) -> float:
    """The mean reward of rollouts on an engine with `model`, recorded into `store`."""
    state = engine.up(str(model), dtype="float32", max_model_len=options.max_model_len)
    command = [
        POLAR_MITM, "collect", "-s", store, "-e", state.url, "--harness", options.harness, "--tasks",
        options.tasks, "--max-tokens", options.max_tokens, "--json", *more,
    ]  # fmt: skip
    try:
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    finally:
        engine.down()
    mean: float = json.loads(done.stdout.splitlines()[-1])["mean_reward"]
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--tasks")
    parser.add_argument("--harness", default="pi")
    parser.add_argument("--num-tasks", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--samples-per-update", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not (options.store or options.tasks):
        parser.error("give --tasks, to record rollouts on, or a --store of some")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        store = options.store or folder / "runs.duckdb"
        if not options.store:
            size = ("--num-tasks", options.num_tasks, "--group-size", options.group_size)
            print(
                f"recorded: mean reward {collected(options.model, store, options, *size):.3f}",
                file=sys.stderr,
            )
        rows = []
        for builder, tree in SIDES:
            with open_reader(store) as reader:
                missing = set(unbuilt(reader, builder))
            if missing:
                write_trajectories(store, builder, missing)
            config = TrainConfig(
                policy=PolicyConfig(model=str(options.model)),
                optimiser=OptimiserConfig(lr=options.lr),
                loss=LossConfig(name="dapo"),
                packing=PackingConfig(tree=tree, max_tokens=65_536),
            )
            given = samples(store, builder, config)
            out = folder / f"{builder}-{tree}"
            row = Row(
                builder, tree, len(given), sum(s.num_trained for s in given),
                *train(given, config, options.samples_per_update, out),
            )  # fmt: skip
            if options.tasks:
                held_out = ("--split", "test", "--num-tasks", 64)
                row.reward = collected(out, folder / f"{out.name}.duckdb", options, *held_out)
            rows.append(row)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print_table(
        "builder,tree,samples,trained,updates,laid out,seconds,fewer updates,faster,reward",
        [
            (
                r.builder, "yes" if r.tree else "no", r.samples, r.trained, r.updates, r.laid_out,
                round(r.seconds, 1), round(rows[0].updates / r.updates, 2),
                round(rows[0].seconds / r.seconds, 2), r.reward,
            )
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
