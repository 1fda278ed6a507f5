"""How many new tokens a second become trajectories, from memory and out of a store, on one core.

    python -m tests.bench.bench_reconstruct [--rollouts N] [--calls N] [--new N] [--json]

A call's new tokens are those that no call before it has: its part of the prompt, and what was sampled, a
quarter of them. Two shapes of a rollout: `chain`, each call on top of the one before; `mixed`, the same with
a retry and an auxiliary call in twenty, and with a new history after each hundred. `memory` starts with the
arrays of one rollout, `store` with a DuckDB file as the recorder leaves it, its pages in the operating
system's cache but not in DuckDB's; `read` is the part of `store` before reconstruction. Each trajectory is
assembled, one at a time, and each account must add up. The process is bound to one processor.

`tokens_per_s` counts new tokens by the clock, of the best round; `cpu` by processor time, which other
programs on the machine disturb less. `out` counts the tokens of all trajectories instead: a retry has as long
a context as the answer that lived on, and a trajectory of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from polar_mitm.columns import NO_BASE, Lists, RolloutColumns
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader, schema
from polar_mitm.store.columns import each_rollout
from polar_mitm.store.recorder import Recorder
from polar_mitm.types import Rollout

T = TypeVar("T")
VOCABULARY = 151_936  # Qwen's
AUXILIARY = (40, 300)  # tokens shared with the main thread, and its own


def rollout(number: int, num_calls: int, num_new: int, *, mixed: bool) -> RolloutColumns:
    """One rollout as a store has it."""
    rng = np.random.default_rng(number)
    num_sampled = np.full(num_calls, num_new // 4)
    num_suffix = np.full(num_calls, num_new - num_new // 4)
    base, shared = np.arange(num_calls) - 1, np.zeros(num_calls, np.int64)
    role = ["main"] * num_calls
    tip, num_prompt, num_ids = NO_BASE, 0, 0
    for i in range(num_calls):
        if mixed and i % 100 == 0:
            tip, num_ids = NO_BASE, 0
        base[i], shared[i] = tip, num_ids
        if mixed and i % 20 == 10:
            shared[i], num_suffix[i], role[i] = *AUXILIARY, "auxiliary"
        elif mixed and i % 20 == 5:
            shared[i], num_suffix[i] = num_prompt, 0
        else:
            num_prompt = num_ids + num_suffix[i]
            tip, num_ids = i, num_prompt + num_sampled[i]

    def lists(lengths: np.ndarray, values: np.ndarray) -> Lists:
        return Lists(values, np.concatenate([[0], np.cumsum(lengths)]))

    def ids(lengths: np.ndarray) -> Lists:
        return lists(lengths, rng.integers(0, VOCABULARY, lengths.sum(), dtype=np.int32))

    def same(value: object) -> list:
        return [value] * num_calls

    name = name_of(number)
    return RolloutColumns(
        rollout_id=name,
        call_ids=[f"{name}-{i:06}" for i in range(num_calls)],
        base=base,
        shared=shared,
        suffix=ids(num_suffix),
        completion=ids(num_sampled),
        logprobs=lists(num_sampled, -rng.gamma(0.6, 0.15, num_sampled.sum()).astype(np.float32)),
        num_reported=num_sampled,
        started_at=[float(i) for i in range(num_calls)],
        delivered=[not (mixed and i % 20 == 5) for i in range(num_calls)],
        status=same("ok"),
        role=role,
        finish_reason=same("tool_calls"),
        parent_call_id=same(None),
        continuation=same("exact"),
        fallback=same(None),
        policy_version=same("7"),
        policy_version_last=same(None),
        replayed_from=same(None),
        tokenizer=same("qwen"),
        model_served=same("qwen"),
        guided=same(False),
        agent_id=same(None),
    )


def name_of(number: int) -> str:
    return f"rollout-{number:05}"


def write(path: Path, rollouts: Iterable[RolloutColumns]) -> None:
    """The rollouts as rows of `call_rows`, as the recorder leaves them but for bodies: nobody reads those."""
    with Recorder(path, share=False):
        pass
    con = schema.connect(path)
    for one in rollouts:
        rows = pa.table(
            {
                "call_id": one.call_ids,
                "rollout_id": [one.rollout_id] * len(one),
                "prompt_parent_id": [None if b == NO_BASE else one.call_ids[b] for b in one.base],
                "prompt_shared": pa.array(one.shared, pa.int32()),
                "num_prompt": pa.array(one.shared + one.suffix.lengths, pa.int32()),
                "usage": [f'{{"completion_tokens":{n}}}' for n in one.num_reported],
                "lineage": [f'{{"continuation":"{c}","tokenizer":"qwen"}}' for c in one.continuation],
                **{
                    name: getattr(one, name)
                    for name in ("started_at", "delivered", "status", "role", "finish_reason")
                },
                "policy_version": one.policy_version,
                "model_served": one.model_served,
                "prompt_suffix": _arrow(one.suffix),
                "completion_token_ids": _arrow(one.completion),
                "behaviour_logprobs": _arrow(one.logprobs),
            }
        )
        con.register("rows", rows)
        con.execute("INSERT INTO call_rows BY NAME FROM rows")
    con.execute("CHECKPOINT")
    con.close()


def _arrow(lists: Lists) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(lists.offsets, pa.int32()), pa.array(lists.values))


def num_new(columns: RolloutColumns) -> int:
    return int(columns.suffix.lengths.sum() + columns.completion.lengths.sum())


def rebuild(columns: RolloutColumns) -> int:
    """All trajectories of one rollout, one after the other; the sum of their lengths."""
    trajectories, report = build(columns, rollout=Rollout(columns.rollout_id))
    if not report.adds_up or report.num_quarantined:
        raise SystemExit(f"{columns.rollout_id} does not add up: {report}")
    return sum(each.token_ids.size for each in trajectories)


def timed(work: Callable[[], int], rounds: int) -> tuple[float, float, int]:
    """Seconds of the clock and of the processor of the best of some rounds, and what `work` gave."""
    best = []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        given = work()
        best.append((time.perf_counter() - wall, time.process_time() - cpu, given))
    return min(wall for wall, _, _ in best), min(cpu for _, cpu, _ in best), best[0][2]


def measure_memory(num_calls: int, num_new_each: int, mixed: bool, rounds: int) -> dict[str, float]:
    columns = rollout(0, num_calls, num_new_each, mixed=mixed)
    total = num_new(columns)
    wall, cpu, out = timed(lambda: rebuild(columns), rounds)
    return {
        "tokens": total,
        "tokens_per_s": round(total / wall),
        "cpu_tokens_per_s": round(total / cpu),
        "out_tokens_per_s": round(out / wall),
        "us_per_call": round(wall / num_calls * 1e6, 2),
    }


def measure_store(path: Path, num_rollouts: int, num_tokens: int, rounds: int) -> dict[str, float]:
    """Each round opens the store anew, so that DuckDB has nothing of it in memory; opening is not counted."""
    names = [name_of(i) for i in range(num_rollouts)]

    def over(each: Callable[[RolloutColumns], int]) -> tuple[float, float, int]:
        best = []
        for _ in range(rounds):
            with open_reader(path) as reader:
                best.append(timed(lambda: sum(map(each, each_rollout(reader, names))), 1))
        return min(wall for wall, _, _ in best), min(cpu for _, cpu, _ in best), best[0][2]

    started = peak_mb()
    wall, cpu, out = over(rebuild)
    read_wall, read_cpu, read = over(num_new)
    if read != num_tokens:
        raise SystemExit(f"{read} tokens out of a store of {num_tokens}")
    return {
        "tokens": num_tokens,
        "tokens_per_s": round(num_tokens / wall),
        "cpu_tokens_per_s": round(num_tokens / cpu),
        "out_tokens_per_s": round(out / wall),
        "read_tokens_per_s": round(num_tokens / read_wall),
        "read_cpu_tokens_per_s": round(num_tokens / read_cpu),
        "peak_mb_more_than_idle": round(peak_mb() - started, 1),
    }


def make_store(path: Path, num_rollouts: int, num_calls: int, num_new_each: int, mixed: bool) -> int:
    """How many tokens it holds."""
    num_tokens = 0

    def made() -> Iterator[RolloutColumns]:
        nonlocal num_tokens
        for i in range(num_rollouts):
            one = rollout(i, num_calls, num_new_each, mixed=mixed)
            num_tokens += num_new(one)
            yield one

    write(path, made())
    return num_tokens


def peak_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(function: Callable[..., T], *arguments: object) -> T:
    """In a process of its own, whose memory holds nothing of what was measured before."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rollouts", type=int, default=20, help="in the smaller store; the other has ten times"
    )
    parser.add_argument("--calls", type=int, default=500, help="calls of a rollout")
    parser.add_argument("--new", type=int, default=1000, help="new tokens of a call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rebuild(rollout(0, 20, 100, mixed=True))
    results: dict[str, dict[str, float]] = {}
    for shape in ("chain", "mixed"):
        for times in (0.1, 1, 10):
            num_calls = int(options.calls * times)
            found = measure_memory(num_calls, options.new, shape == "mixed", options.rounds)
            results[f"memory, {shape}, {num_calls} calls"] = found
        for num_rollouts in (options.rollouts, options.rollouts * 10):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "bench.duckdb"
                shaped = options.calls, options.new, shape == "mixed"
                num_tokens = alone(make_store, path, num_rollouts, *shaped)
                found = alone(measure_store, path, num_rollouts, num_tokens, options.rounds)
            results[f"store, {shape}, {num_rollouts} x {options.calls} calls"] = found
    if options.json:
        print(json.dumps(results))
        return
    for name, figures in results.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:>24}  {value:,}")


if __name__ == "__main__":
    main()
