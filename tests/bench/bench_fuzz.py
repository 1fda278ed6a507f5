"""A million requests gone wrong, through every dialect: what crashes, what hangs, what is no answer.

    python -m tests.bench.bench_fuzz [--num N] [--seed S] [--dialect NAME]... [--json]
    python -m tests.bench.bench_fuzz --only S/NUMBER          # one of them again, with all that it gave

Requests are those of `fixtures/`, with parts changed, moved, lost, nested or damaged as bytes; each one goes
through `Exchange.start` and, where it is accepted, an engine's stream that is as damaged goes through `feed`
and `finish`, cut anywhere, with or without an opened head, cancelled, failed or refused. Every answer is read
with its provider's SDK types, and every record is made into a row: `tests/support/fuzzing.py`.

`accepted` requests reached the engine, `refused` ones got a proper error. `crashed`: an exception came out,
or the harness was told of an internal error, or the answer was not its provider's, or a bug was logged.
`hung`: over the limit of `--limit` seconds. Each of both is printed with the seed that gives it again. Times
are of the processor, which other programs on the machine change less; they include reading the answer.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from random import Random

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from polar_mitm.cli.output import print_table
from tests.support.fuzzing import KINDS, Outcome, case, play


class Hung(BaseException):
    """Not an Exception: nobody on the way may take it for one of theirs."""


@dataclass
class Row:
    """What became of the requests of one dialect."""

    dialect: str
    requests: int = 0
    accepted: int = 0
    refused: int = 0
    crashed: int = 0
    hung: int = 0
    slowest_ms: float = 0.0
    seconds: float = 0.0

    @property
    def per_s(self) -> int:
        return round(self.requests / self.seconds) if self.seconds else 0


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hung` in what takes longer on the processor; a regular expression looks for signals, too."""

    def stop(*_: object) -> None:
        raise Hung

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def one(seed: str, kind: str, limit: float, row: Row) -> list[str]:
    """One request; what went wrong, in words. The time of making it up does not count."""
    made = case(Random(seed), kind)
    began = time.process_time()
    outcome = Outcome()
    try:
        with limited(limit):
            outcome = play(made)
    except Hung:
        row.hung += 1
        outcome.problems = [f"hung: more than {limit:g} s"]
    took = time.process_time() - began
    row.requests += 1
    row.seconds += took
    row.slowest_ms = max(row.slowest_ms, took * 1000)
    row.refused += outcome.status == "refused"
    row.accepted += outcome.status not in ("refused", "")
    row.crashed += bool(outcome.problems) and not outcome.problems[0].startswith("hung")
    return outcome.problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--dialect", action="append", choices=KINDS)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that one request may take")
    parser.add_argument("--only", metavar="SEED/NUMBER", help="run one again")
    parser.add_argument("--json", action="store_true", help="one JSON object per dialect on stdout")
    args = parser.parse_args()
    kinds = args.dialect or KINDS
    rows = {kind: Row(kind) for kind in kinds}
    if args.only:
        kind = KINDS[int(args.only.rpartition("/")[2]) % len(KINDS)]
        print(case(Random(args.only), kind))
        print("\n".join(one(args.only, kind, args.limit, Row(kind))) or "nothing wrong")
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    for kind in KINDS:  # what is made once, such as the SDKs' validators, is nobody's time
        for number in range(20):
            play(case(Random(f"warm/{number}"), kind))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("0 problems", total=args.num)
        num_problems = number = done = 0
        while done < args.num:
            kind = KINDS[number % len(KINDS)]
            if kind in rows:
                problems = one(f"{args.seed}/{number}", kind, args.limit, rows[kind])
                done += 1
                if problems:
                    num_problems += 1
                    progress.console.print(
                        f"--only {args.seed}/{number}  {kind}\n" + "\n".join(problems), markup=False
                    )
                if done % 100 == 0 or done == args.num:
                    progress.update(task, completed=done, description=f"{num_problems} problems")
            number += 1
    if args.json:
        for row in rows.values():
            print(json.dumps(asdict(row) | {"per_s": row.per_s}))
    else:
        cells = [
            (r.dialect, r.requests, r.accepted, r.refused, r.crashed, r.hung, round(r.slowest_ms, 1), r.per_s)
            for r in rows.values()
        ]
        print_table("dialect,requests,accepted,refused,crashed,hung,slowest ms,requests/s", cells)
    sys.exit(1 if num_problems else 0)


if __name__ == "__main__":
    main()
