"""One update on a group behind a long shared prompt: as a tree, as sequences, and by TRL's GRPOTrainer.

    python -m tests.bench.bench_tree [--prompt N] [--group N] [--answer N] [--skip-trl] [--json]

`group` trajectories share `prompt` tokens, as behind a coding harness's system prompt and tools, and go
on with turns of their own, `answer` tokens on average. Same weights (4 layers, hidden 192, vocabulary
2,048, float32), samples, loss (DAPO) and AdamW; each side in a process of its own
(`tests.bench.update_sides`). `tree` computes the prompt once, `sequence` packs without padding, `trl`
goes through one sequence per forward pass, where it is fastest here: all are nearly as long, so it pads
little, and more at once only cost it memory.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from polar_mitm_trainer.samples import Sample
from tests.bench.updates import VOCABULARY, Spec, check_same, report, run, save, trajectory, write_model


def group(num: int, prompt: int, answer: int) -> list[Sample]:
    """Turns of an answer and twice as many tokens of a tool's output."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, VOCABULARY, prompt)
    made = []
    for number in range(num):
        turns: list[tuple[int, int]] = []
        left = int(rng.integers(answer // 2, 3 * answer // 2 + 1))
        while left > 0:
            sampled = min(left, int(rng.integers(20, 100)))
            turns.append((sampled, 2 * sampled))
            left -= 3 * sampled
        made.append(trajectory(rng, number, shared, turns))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", type=int, default=8_192)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--answer", type=int, default=400)
    parser.add_argument(
        "--steps", type=int, default=1, help="updates per side; of several the first only warms up"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-trl", action="store_true", help="it takes most of the time")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    samples = group(args.group, args.prompt, args.answer)
    lengths = [each.token_ids.size for each in samples]
    with tempfile.TemporaryDirectory() as name:
        model, file = Path(name) / "model", Path(name) / "samples.npz"
        write_model(model)
        save(file, samples)
        spec = Spec(
            side="ours",
            model=str(model),
            samples=str(file),
            prompt=args.prompt,
            steps=args.steps,
            threads=args.threads,
            max_tokens=sum(lengths),
        )
        results = {"tree": run(spec), "sequence": run(spec, tree=False, max_tokens=max(lengths))}
        if not args.skip_trl:
            results["trl"] = run(spec, side="trl")
    check_same(results)
    report(results, lengths, [("tree", name) for name in results if name != "tree"], args.json)


if __name__ == "__main__":
    main()
