"""How fast written trajectories become packed arrays for a training batch.

    python tests/bench/bench_batches.py [--tokens N] [--batch N] [--json]

Trajectories of 4,000 to 32,000 tokens, a fifth of them sampled, in runs of 20 to 400 tokens, are written as
`polar-mitm reconstruct --write` does and read in batches: `wall` tokens per second of the clock, `cpu` of
processor time, which other programs on the machine change less. `first` is a reader's first pass over the
file, whose pages the operating system has in its cache, `again` the second one; `fresh` gives each batch
memory of its own. Every array is compared with what was written.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from polar_mitm.reconstruct import Trajectory
from polar_mitm.store import Recorder, open_reader
from polar_mitm.store.batches import packed_batches
from polar_mitm.store.offline import writing
from polar_mitm.store.trajectories import TrajectoryWriter

VOCABULARY = 151_936  # Qwen's
PER_ROLLOUT = 8


def trajectory(rng: np.random.Generator, number: int) -> Trajectory:
    """Ids whose frequencies follow Zipf's law; turns of an answer after four times as many given tokens."""
    sampled = rng.integers(20, 400, int(rng.integers(6, 24)))
    runs = np.stack([sampled * 4, sampled], 1).ravel()
    mask = np.repeat(np.tile(np.array([0, 1], np.uint8), sampled.size), runs)
    ids = np.minimum(np.exp(rng.random(mask.size) * np.log(VOCABULARY)), VOCABULARY - 1).astype(np.int32)
    logprobs = np.where(mask, -rng.gamma(0.6, 0.15, mask.size), 0.0).astype(np.float32)
    rollout = f"rollout-{number // PER_ROLLOUT}"
    return Trajectory(f"trajectory-{number}", rollout, "g", "main", ids, mask, logprobs, (), None, None)


def write(path: Path, num_tokens: int) -> list[Trajectory]:
    """A store with at least `num_tokens` tokens of trajectories."""
    rng = np.random.default_rng(0)
    made: list[Trajectory] = []
    while num_tokens > 0:
        made.append(trajectory(rng, len(made)))
        num_tokens -= made[-1].token_ids.size
    with Recorder(path, on_alarm=sys.exit, share=False):
        pass
    with writing(path) as store:
        writer = TrajectoryWriter(store, "forest", [])
        for first in range(0, len(made), PER_ROLLOUT):
            some = made[first : first + PER_ROLLOUT]
            writer.write(some[0].rollout_id, some, {})
        writer.flush()
    return made


def check(path: Path, made: list[Trajectory], batch: int) -> None:
    """Every array is what was written."""
    at = 0
    with open_reader(path) as reader:
        for found in packed_batches(reader, max_tokens=batch, trained_only=False, reuse=True):
            some = made[at : at + len(found.trajectory_ids)]
            at += len(some)
            assert found.trajectory_ids == tuple(t.trajectory_id for t in some)
            assert np.array_equal(found.token_ids, np.concatenate([t.token_ids for t in some]))
            assert np.array_equal(found.loss_mask, np.concatenate([t.loss_mask for t in some]))
            assert np.array_equal(
                found.behaviour_logprobs, np.concatenate([t.behaviour_logprobs for t in some])
            )
            assert found.cu_seqlens.tolist() == [0, *np.cumsum([t.token_ids.size for t in some])]
    assert at == len(made)


def read(path: Path, batch: int, reuse: bool) -> list[tuple[float, float]]:
    """Seconds of the clock and of the processor to go over all batches, twice with one reader."""
    passes = []
    with open_reader(path) as reader:
        for _ in range(2):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in packed_batches(reader, max_tokens=batch, trained_only=False, reuse=reuse):
                pass
            passes.append((time.perf_counter() - wall, time.process_time() - cpu))
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens in the store")
    parser.add_argument("--batch", type=int, default=4_000_000, help="tokens per batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.duckdb"
        began = time.perf_counter()
        made = write(path, args.tokens)
        num_tokens = sum(t.token_ids.size for t in made)
        result: dict[str, float] = {
            "tokens": num_tokens,
            "trajectories": len(made),
            "written_per_s": round(num_tokens / (time.perf_counter() - began)),
            "file_bytes_per_token": round(path.stat().st_size / num_tokens, 2),
        }
        check(path, made, args.batch)
        for memory, reuse in (("reused", True), ("fresh", False)):
            rounds = [read(path, args.batch, reuse) for _ in range(args.rounds)]
            for name, passes in zip(("first", "again"), zip(*rounds, strict=True), strict=True):
                for kind, seconds in zip(("wall", "cpu"), zip(*passes, strict=True), strict=True):
                    result[f"{memory}_{name}_{kind}_tokens_per_s"] = round(num_tokens / min(seconds))
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:>34}  {value:,}")


if __name__ == "__main__":
    main()
