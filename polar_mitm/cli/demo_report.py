"""What `polar-mitm demo` shows in the end, to people and to machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from polar_mitm.cli.calls import counts_of, tell_calls, tell_refused, tokens_per_s
from polar_mitm.cli.output import print_json, print_table, printable, tell
from polar_mitm.cli.reading import reading
from polar_mitm.cli.rollout import Outcome
from polar_mitm.cli.trajectories import account, reasons
from polar_mitm.upstream.engine import EngineInfo

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

    own = [each.outcome.rollout_id for each in demo.ran]
    with reading(demo.store) as reader:
        rollouts = {r.rollout_id: r for r in reader.rollouts()}
        calls = {i: reader.calls(i) for i in own}
        counts = counts_of(reader)
        refused = {i: reader.egress(i) for i in own}
    reports = [build(calls[i], rollout=rollouts[i])[1] for i in own]
    rates = [tokens_per_s(calls[i], counts) for i in own]
    totals = account(reports)
    answered = all(any(call.status == "ok" for call in calls[i]) for i in own)
    if json:
        harnesses = [_harness(ran, rate) for ran, rate in zip(demo.ran, rates, strict=True)]
        print_json(
            {
                "engine": msgspec.to_builtins(demo.engine),
                "harnesses": harnesses,
                "unavailable": demo.unavailable,
                "accounting": totals,
                "trajectories": sum(r.num_trajectories for r in reports),
                "store": demo.store,
            }
        )
        return answered
    for ran in demo.ran:
        o = ran.outcome
        tell(f"\n{o.name} {o.version}  rollout {o.rollout_id}", style="bold")
        tell(f"the end of its output ({ran.log}):")
        for line in ran.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]:
            tell(f"  | {printable(line)[:200]}", style="dim")
        tell_calls(calls[o.rollout_id], counts)
        tell_refused(refused[o.rollout_id])
    tell("\nharnesses", style="bold")
    print_table(
        "harness,version,exit,calls,sampled,tok/s,seconds,task",
        [
            (o.name, o.version, o.exit_code, o.calls, o.sampled_tokens, rate, o.seconds, _solved(ran))
            for ran, rate in zip(demo.ran, rates, strict=True)
            for o in [ran.outcome]
        ],
    )
    tell("\nreconstruction", style="bold")
    print_table(
        "harness,trajectories,sampled,trained,masked,quarantined,reasons",
        [
            (
                ran.outcome.name,
                r.num_trajectories,
                r.sampled,
                r.trained,
                r.num_masked,
                r.num_quarantined,
                reasons(r),
            )
            for ran, r in zip(demo.ran, reports, strict=True)
        ],
    )
    whole = "every sampled token is accounted for" if all(r.adds_up for r in reports) else "NOT accounted for"
    tell(
        f"{whole}: {totals['sampled']} sampled, {totals['trained']} trained, {totals['masked']} masked, "
        f"{totals['quarantined']} quarantined"
    )
    if not any(ran.solved for ran in demo.ran):
        tell(
            f"nobody solved the task: {demo.engine.model} may be too small for it; --engine URL takes another"
        )
    tell(f"\nthe database: {demo.store}", style="bold")
    tell(f"  polar-mitm calls --store {demo.store}")
    tell(f"  polar-mitm show CALL --tokens --store {demo.store}")
    tell(f"  polar-mitm export --out trajectories.parquet --store {demo.store}")
    return answered


def _harness(ran: Ran, rate: float | None) -> dict[str, Any]:
    keys = (
        "name",
        "version",
        "exit_code",
        "calls",
        "sampled_tokens",
        "refused",
        "rollout_id",
        "incomplete",
        "seconds",
    )
    whole = asdict(ran.outcome)
    return {key: whole[key] for key in keys} | {"tokens_per_s": rate, "solved": ran.solved, "log": ran.log}


def _solved(ran: Ran) -> str:
    return "solved" if ran.solved else "not solved"
