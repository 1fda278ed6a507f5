"""What `polar-mitm demo` shows in the end, to people and to machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_mitm.cli.calls import Count, counts_of, tell_calls, tell_refused, tokens_per_s
from polar_mitm.cli.output import print_json, print_table, tell
from polar_mitm.cli.reading import reading
from polar_mitm.cli.rollout import Outcome
from polar_mitm.cli.trajectories import account, reasons
from polar_mitm.types import EgressEvent, ModelCall
from polar_mitm.upstream.engine import EngineInfo

if TYPE_CHECKING:
    from polar_mitm.reconstruct import BuildReport

_LAST_LINES = 6


@dataclass
class Ran:
    """One harness's run: what it printed, and whether the file that it was to make is there."""

    outcome: Outcome
    log: Path
    solved: bool


@dataclass
class Demo:
    """All that was run, and why the rest was not."""

    engine: EngineInfo
    store: Path
    ran: list[Ran]
    unavailable: dict[str, str]


def tell_demo(demo: Demo, json: bool) -> bool:
    """Read the database and say what is in it of this demo; whether each harness was answered."""
    from polar_mitm.reconstruct import build

    own = [ran.outcome.rollout_id for ran in demo.ran]
    with reading(demo.store) as reader:
        rollouts = {r.rollout_id: r for r in reader.rollouts()}
        calls = [reader.calls(i) for i in own]
        events = [reader.egress(i) for i in own]
        counts = counts_of(reader)
    reports = [build(found, rollout=rollouts[i])[1] for i, found in zip(own, calls, strict=True)]
    rates = [tokens_per_s(found, counts) for found in calls]
    if json:
        print_json(_document(demo, rates, reports))
    else:
        for ran, found, refused in zip(demo.ran, calls, events, strict=True):
            _tell_run(ran, found, counts, refused)
        _tell_tables(demo, rates, reports)
        _tell_what_next(demo)
    return all(any(call.status == "ok" and call.completion_token_ids for call in found) for found in calls)


def _document(demo: Demo, rates: list[float | None], reports: list[BuildReport]) -> dict[str, Any]:
    harnesses = []
    for ran, rate in zip(demo.ran, rates, strict=True):
        outcome = {name: value for name, value in asdict(ran.outcome).items() if name != "store"}
        harnesses.append(outcome | {"tokens_per_s": rate, "solved": ran.solved, "log": ran.log})
    return {
        "engine": demo.engine,
        "harnesses": harnesses,
        "unavailable": demo.unavailable,
        "accounting": account(reports),
        "trajectories": sum(r.num_trajectories for r in reports),
        "store": demo.store,
    }


def _tell_run(ran: Ran, calls: list[ModelCall], counts: dict[str, Count], refused: list[EgressEvent]) -> None:
    outcome = ran.outcome
    tell(f"\n{outcome.name} {outcome.version}  rollout {outcome.rollout_id}", style="bold")
    tell(f"the end of its output ({ran.log}):")
    for line in ran.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
        tell(f"  | {line[:200]}", style="dim")
    tell_calls(calls, counts)
    tell_refused(refused)


def _tell_tables(demo: Demo, rates: list[float | None], reports: list[BuildReport]) -> None:
    tell("\nharnesses", style="bold")
    outcomes = [(ran.outcome, "solved" if ran.solved else "not solved") for ran in demo.ran]
    print_table(
        "harness,version,exit,calls,sampled,tok/s,seconds,task",
        [
            (o.name, o.version, o.exit_code, o.calls, o.sampled_tokens, rate, o.seconds, task)
            for (o, task), rate in zip(outcomes, rates, strict=True)
        ],
    )
    tell("\nreconstruction", style="bold")
    print_table(
        "harness,trajectories,sampled,trained,masked,quarantined,reasons",
        [
            (o.name, r.num_trajectories, r.sampled, r.trained, r.num_masked, r.num_quarantined, reasons(r))
            for (o, _), r in zip(outcomes, reports, strict=True)
        ],
    )
    whole = "every sampled token is accounted for" if all(r.adds_up for r in reports) else "NOT accounted for"
    tell(f"{whole}: {', '.join(f'{number} {name}' for name, number in account(reports).items())}")


def _tell_what_next(demo: Demo) -> None:
    if not any(ran.solved for ran in demo.ran):
        tell(f"nobody solved the task: {demo.engine.model} may be too small; --engine URL takes another")
    tell(f"\nthe database: {demo.store}", style="bold")
    tell(f"  polar-mitm calls --store {demo.store}")
    tell(f"  polar-mitm show CALL --tokens --store {demo.store}")
    tell(f"  polar-mitm export --out trajectories.parquet --store {demo.store}")
