"""One update on ragged agent trajectories: this trainer against TRL's GRPOTrainer.

    python -m tests.bench.bench_trl [--size small|medium|large] [--loss dapo|grpo] [--checkpointing] [--json]

A group of trajectories behind a short prompt, each some turns of 20 to 200 sampled tokens and four times
as many from tools; few long ones among many short ones. Same weights (4 layers, hidden 192, vocabulary
2,048, float32), samples, loss and AdamW; each side in a process of its own, one after the other
(`tests.bench.update_sides`). `sequence` is ours without sharing what trajectories begin with, `tree` with
it, both with micro-batches of the longest one's length; `trl-N` is TRL with N sequences per device and
forward pass, which pads to the longest of the step whatever N is. Ratios are to the best of TRL's in each
figure.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from polar_mitm_trainer.samples import Sample
from tests.bench.updates import VOCABULARY, Spec, check_same, report, run, save, trajectory, write_model

SIZES = {"small": (8, 1_000), "medium": (16, 2_500), "large": (32, 6_000)}  # trajectories, and the longest


def ragged(num: int, longest: int) -> tuple[list[Sample], int]:
    """`num` trajectories of up to about `longest` tokens, and the length of their prompt."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCABULARY, longest // 8)
    made = []
    for number, share in enumerate(rng.permutation(np.linspace(0.1, 1.0, num) ** 2)):
        turns: list[tuple[int, int]] = []
        while not turns or prompt.size + sum(map(sum, turns)) < share * longest:
            sampled = int(rng.integers(20, 200))
            turns.append((sampled, 4 * sampled))
        made.append(trajectory(rng, number, prompt, turns))
    return made, prompt.size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--loss", choices=["dapo", "grpo"], default="dapo")
    parser.add_argument("--steps", type=int, default=2, help="updates per side, of which the first warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-batch", type=int, nargs="+", default=[1, 4], help="sequences per forward pass")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    samples, prompt = ragged(*SIZES[args.size])
    lengths = [each.token_ids.size for each in samples]
    with tempfile.TemporaryDirectory() as name:
        model, file = Path(name) / "model", Path(name) / "samples.npz"
        write_model(model)
        save(file, samples)
        spec = Spec(
            side="ours",
            model=str(model),
            samples=str(file),
            prompt=prompt,
            loss=args.loss,
            steps=args.steps,
            threads=args.threads,
            checkpointing=args.checkpointing,
            max_tokens=max(lengths),
        )
        results = {
            "sequence": run(spec, tree=False),
            "tree": run(spec),
            **{f"trl-{n}": run(spec, side="trl", batch=n) for n in args.trl_batch},
        }
    check_same(results)
    report(results, lengths, [("sequence", "trl"), ("tree", "trl")], args.json)


if __name__ == "__main__":
    main()
