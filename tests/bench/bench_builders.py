"""What each builder makes of the same recorded rollouts: the ablation.

    python -m tests.bench.bench_builders [STORE]... [--model DIR] [--json]
        [--record DIRECTORY [--harness NAME]... [--turns tools|words]]

`--record` has real harnesses talk to the managed engine with its real model, each with continuation and
without, into one store each: one conversation over three processes, eight calls of which five call a tool.
The model is held to calling tools by a grammar (`tests/e2e/sessions.py`); with `--turns words` it says what
it likes, in three calls.

Per harness, continuation and builder:

- `trajectories` that train something, `trained` tokens, and `lost`, sampled in calls that would train but are
  in no trajectory (Polar's rule drops what it cannot splice);
- `positions`, the tokens of these trajectories: what a trainer without prefix sharing computes;
- `mismatched`: trained tokens whose context is not the one that they were sampled under, counted id for id;
- with `--model`, what that does to their logprobs, teacher-forced in torch under both contexts: `max` and
  `mean` of the size of the change in nats, over the mismatched tokens, and `kl`, which is the mean of
  log p(own context) - log p(this one): Schulman's k1, since his k3 takes e to the power of such changes.
  Tokens sampled under a grammar bias it; those of `--turns words` do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from polar_mitm import engine
from polar_mitm.cli.output import print_table
from polar_mitm.cli.verify import torch_command
from polar_mitm.engine.build import clean_environment
from polar_mitm.reconstruct import Builder, build
from polar_mitm.store import open_reader
from polar_mitm.verify import Drift, ProcessScorer, Sampled, sampled
from polar_mitm.verify import Path as Trajectory
from polar_mitm.verify.context import differences
from tests.e2e.sessions import HARNESSES, in_front_of, made_to_look, session
from tests.support.record_fixtures import POLAR_MITM

BUILDERS: tuple[Builder, ...] = ("per-request", "polar-splice", "forest")


@dataclass
class Row:
    """One builder on all rollouts of one harness, recorded one way."""

    harness: str
    continuation: bool
    builder: str
    rollouts: int = 0
    calls: int = 0
    trajectories: int = 0
    sampled: int = 0
    trained: int = 0
    lost: int = 0
    positions: int = 0
    mismatched: int = 0
    drift: Drift = field(default_factory=Drift)


async def measure(stores: Sequence[Path], scorer: ProcessScorer | None) -> list[Row]:
    """All builders on all complete rollouts of these stores."""
    rows: dict[tuple[str, bool, str], Row] = {}
    for store in stores:
        with open_reader(store) as reader:
            for rollout in reader.rollouts():
                calls = reader.calls(rollout.rollout_id)
                known = {call.call_id: sampled(call) for call in calls}
                continued = any(call.continuation == "exact" for call in calls)
                for builder in BUILDERS:
                    key = (rollout.harness or Path(rollout.command[0]).name, continued, builder)
                    trajectories, report = build(calls, rollout=rollout, builder=builder)
                    row = rows.setdefault(key, Row(*key))
                    row.rollouts += 1
                    row.calls += len(calls)
                    row.sampled += report.sampled
                    row.trained += report.trained
                    row.lost += report.masked.get("dropped", 0)
                    mismatched = 0
                    for path in trajectories:
                        if path.loss_mask.any():
                            row.trajectories += 1
                            row.positions += path.token_ids.size
                            mismatched += await compare(path, known, row, scorer)
                    if mismatched != report.mismatched or not report.adds_up:
                        sys.exit(f"{builder} counts {report.mismatched} mismatched tokens, not {mismatched}")
                    row.mismatched += mismatched
    return sorted(rows.values(), key=lambda r: (r.harness, r.continuation))


async def compare(path: Trajectory, known: dict[str, Sampled], row: Row, scorer: ProcessScorer | None) -> int:
    """How many tokens train under another context; with a scorer, what that does to their logprobs."""
    wrong = {d.call_id for d in differences(path, known) if d.what == "prompt"}
    spans = [span for span in path.spans if span.call_id in wrong and span.mask_reason is None]
    if spans and scorer is not None:
        under_it = await scorer.score(path.token_ids[: spans[-1].end])
        for span in spans:
            exact = await scorer.score(known[span.call_id].ids)
            own = exact[known[span.call_id].prompt_ids.size :]
            row.drift += Drift.of(under_it[span.sampled_start : span.end], own)
    return sum(span.end - span.sampled_start for span in spans)


async def record(folder: Path, harnesses: Sequence[str], turns: str) -> list[Path]:
    """Conversations of these harnesses, with continuation and without, each in a store of its own."""
    running = engine.status()
    state = running or engine.up(on_step=lambda step: print(step, file=sys.stderr))
    stores = []
    try:
        looking = in_front_of(state.url, made_to_look)
        async with looking if turns == "tools" else nullcontext(state.url) as url:
            for name in harnesses:
                for continuation in (True, False):
                    store = folder / f"{name}-{turns}-{'continued' if continuation else 'rendered'}.duckdb"
                    if not store.exists():
                        await run(name, store, url, continuation)
                    stores.append(store)
    finally:
        if running is None:
            engine.down()
    return stores


async def run(name: str, store: Path, url: str, continuation: bool) -> None:
    """One conversation."""
    print(f"recording {store}", file=sys.stderr)
    given = ["run", "--store", store, "--engine", url, "--harness", name, "--max-tokens", "256"]
    process = await asyncio.create_subprocess_exec(
        POLAR_MITM, *map(str, given), "--", *session(name),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**os.environ, "POLAR_MITM_CONTINUATION": str(continuation)},
    )  # fmt: skip
    if await process.wait() != 0:
        sys.exit(f"{name} did not come to its end")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stores", nargs="*", type=Path, metavar="STORE")
    parser.add_argument("--record", type=Path, metavar="DIRECTORY")
    parser.add_argument("--harness", action="append", choices=HARNESSES)
    parser.add_argument("--turns", choices=("tools", "words"), default="tools")
    parser.add_argument("--model", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.record:
        given.record.mkdir(parents=True, exist_ok=True)
    return given


async def main(given: argparse.Namespace) -> None:
    stores = given.stores
    if given.record:
        stores = [*stores, *await record(given.record, given.harness or list(HARNESSES), given.turns)]
    async with AsyncExitStack() as stack:
        scorer = None
        if given.model:
            command = torch_command(given.model, "float32")
            scorer = await stack.enter_async_context(ProcessScorer(command, clean_environment()))
        rows = await measure(stores, scorer)
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    columns = "harness,continuation,builder,rollouts,calls,trajectories,sampled,trained,lost,positions"
    print_table(f"{columns},mismatched,max,mean,kl", map(cells, rows))


def cells(row: Row) -> tuple[object, ...]:
    """A line of the table."""
    counts = (row.rollouts, row.calls, row.trajectories, row.sampled, row.trained, row.lost, row.positions)
    share = f"{row.mismatched} ({row.mismatched / row.trained:.0%})" if row.mismatched else "0"
    drift = (row.drift.max, row.drift.mean, -row.drift.bias) if row.drift.num_tokens else ()
    figures = [f"{value:.2g}" for value in drift] or ["", "", ""]
    return row.harness, "yes" if row.continuation else "no", row.builder, *counts, share, *figures


if __name__ == "__main__":
    asyncio.run(main(arguments()))
