"""Whether it learns: `polar-mitm rl` on the tiny policy, through real harnesses, over several seeds.

    python -m tests.bench.bench_learning --out DIR [--harness pi] [--harness codex] [--seeds 3] [--png FILE]

Each run is that of `fixtures/rl/HARNESS.toml` with another seed, one after the other, on an engine of its
own; a run that is in DIR already is not done again. Told per run: the reward on held-out tasks before and
after, with its standard error, minutes, and the largest difference between engine and learner.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb

from polar_mitm.cli.output import print_table
from tests.support.record_fixtures import POLAR_MITM

ROOT = Path(__file__).parents[2]
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


@dataclass
class Run:
    """One seed. `rewards` [steps] in training; `mismatch` in nats."""

    harness: str
    seed: int
    before: float
    after: float
    stderr: float
    minutes: float
    mismatch: float
    rewards: list[float]


def learned(harness: str, seed: int, out: Path) -> Run:
    """What a run came to, done now unless it has been."""
    folder, told = out / f"{harness}-{seed}", out / f"{harness}-{seed}.json"
    if not told.exists():
        config = (ROOT / "fixtures" / "rl" / f"{harness}.toml").read_text()
        lines = [line for line in config.splitlines() if not line.startswith("out =")]
        toml = out / f"{harness}-{seed}.toml"
        toml.write_text("\n".join([f'out = "{folder.absolute()}"', f"seed = {seed}", *lines]))
        began = time.monotonic()
        done = subprocess.run([POLAR_MITM, "rl", toml, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{harness}, seed {seed}: exit {done.returncode}")
        document = json.loads(done.stdout.splitlines()[-1]) | {"minutes": (time.monotonic() - began) / 60}
        told.write_text(json.dumps(document))
    document = json.loads(told.read_text())
    with duckdb.connect(str(folder / "run.duckdb"), read_only=True) as con:
        (mismatch,) = con.execute(
            "SELECT max(value) FROM metrics WHERE name = 'train/mismatch_abs_max'"
        ).fetchone() or (float("nan"),)
    before, after = document["before"], document["after"]
    return Run(
        harness, seed, before["reward"], after["reward"], after["stderr"], document["minutes"], mismatch,
        list(document["rewards"].values()),
    )  # fmt: skip


def draw(runs: list[Run], path: Path) -> None:
    """Rewards in training, a line per run, and on held-out tasks, before and after, a dot each."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run.harness for run in runs))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        for run in (run for run in runs if run.harness == name):
            colour = COLOURS[run.seed % len(COLOURS)]
            steps = range(1, len(run.rewards) + 1)
            axes.plot(steps, run.rewards, color=colour, linewidth=1, label=f"seed {run.seed}")
            axes.plot([0, len(run.rewards)], [run.before, run.after], "o", color=colour)
        axes.set(title=name, xlabel="step", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("reward (dots: held-out tasks)")
    figure.axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--harness", action="append", help="of fixtures/rl; pi and codex by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--png", type=Path, help="where to draw the curves; else into --out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    harnesses = options.harness or ["pi", "codex"]
    runs = [learned(name, seed, options.out) for seed in range(options.seeds) for name in harnesses]
    runs.sort(key=lambda run: (harnesses.index(run.harness), run.seed))
    draw(runs, options.png or options.out / "curves.png")
    if options.json:
        print(json.dumps([asdict(run) for run in runs]))
        return
    print_table(
        "harness,seed,held out before,after,+-,minutes,max mismatch (nats)",
        [
            (
                r.harness, r.seed, f"{r.before:.3f}", f"{r.after:.3f}", f"{r.stderr:.3f}",
                f"{r.minutes:.1f}", f"{r.mismatch:.1e}",
            )
            for r in runs
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
