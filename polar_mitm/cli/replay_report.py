"""What `polar-mitm replay` tells people."""

from __future__ import annotations

from polar_mitm.cli.output import plural, print_table, short, tell
from polar_mitm.cli.rollout import Outcome
from polar_mitm.replay import ReplayReport, Step
from polar_mitm.types import ModelCall, Rollout

NOTHING_BEFORE = ("first_call", "compacted")
"""Why a call that a fork begins with may have no recorded tokens to go on from."""


def is_exact(live: ModelCall) -> bool:
    """A fork's first live call goes on from exactly the recorded tokens, where there are any."""
    return live.continuation == "exact" or live.fallback in NOTHING_BEFORE


def tell_report(
    report: ReplayReport, outcome: Outcome, recorded: Rollout, live: ModelCall | None, faithful: bool
) -> None:
    """A line per request, and what it all came to. `live` is the call that a fork begins with."""
    what = f"{recorded.harness} {recorded.harness_version}".strip()
    tell(f"replay of rollout {report.rollout_id}  {what}", style="bold")
    print_table("request,recorded call,outcome,first divergence", [_row(step) for step in report.steps])
    for call_id in report.unreached:
        tell(f"never asked: call {call_id}", style="red")
    if outcome.exit_code != recorded.exit_code:
        tell(f"the harness ended with {outcome.exit_code}, in the record with {recorded.exit_code}")
    if live is not None and not is_exact(live):
        tell(f"the live part does not go on from the recorded tokens: {live.fallback}", style="red")
    differing = sum(step.outcome in ("diverged", "unmatched") for step in report.steps)
    tell(
        f"{report.num_served} of {plural(report.num_recorded, 'recorded call')} served, "
        f"{plural(differing, 'request')} differing, {outcome.seconds:.1f} s: {_verdict(report, faithful)}"
    )
    if report.forked:
        tell(f"rollout {outcome.rollout_id} in {outcome.store}")


def _verdict(report: ReplayReport, faithful: bool) -> str:
    if report.forked_at is not None:
        if not report.forked:
            return f"never came to the fork at {short(report.forked_at)}"
        return f"forked at {short(report.forked_at)}" + ("" if faithful else ", but not as recorded")
    if report.unreached:
        return "did not reach the end"
    return "reached the end without divergence" if faithful else "did not go as recorded"


def _row(step: Step) -> tuple[object, ...]:
    said = [step.note] if step.note else []
    if (first := step.first) is not None:
        more = f" and {step.num_divergences - 1} more" if step.num_divergences > 1 else ""
        said.append(f"{first.field} {first.kind}: {first.recorded!r} -> {first.live!r}{more}")
    return step.number, short(step.recorded or ""), step.outcome, "; ".join(said)
