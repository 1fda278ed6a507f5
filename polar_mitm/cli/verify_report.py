"""What `polar-mitm verify` shows, to people and to machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from polar_mitm.cli.output import plural, print_table, say, short, tell

if TYPE_CHECKING:
    from polar_mitm.verify import Drift, RolloutReport

_NUM_NAMED = 10


def document(reports: list[RolloutReport], sound: bool, held: str | None, tolerance: float) -> dict[str, Any]:
    """All of it, for machines."""
    return {
        "sound": sound,
        "weights": held,
        "tolerance": tolerance,
        "context_equality": _share(reports),
        "drift": asdict(_drift(reports)),
        "rollouts": [
            asdict(report)
            | {
                "sound": report.sound,
                "drift": asdict(report.drift),
                "outliers": list(map(asdict, report.outliers)),
            }
            for report in reports
        ],
    }


def tell_reports(reports: list[RolloutReport], scored: bool, held: str | None, tolerance: float) -> None:
    """A table, what is wrong, and the sum."""
    columns = "rollout,trajectories,calls,context equal,sampled,trained"
    rows: list[tuple[object, ...]] = [
        (short(r.rollout_id), r.num_trajectories, r.num_calls, _percent([r]), r.sampled, r.trained)
        for r in reports
    ]
    if scored:
        columns += ",scored,max drift,mean drift,mismatch KL,not scored"
        rows = [(*row, *_scores(report)) for row, report in zip(rows, reports, strict=True)]
    print_table(columns, rows)
    for line in _complaints(reports, tolerance):
        tell(line, style="red")
    num_calls = plural(sum(r.num_calls for r in reports), "call")
    tell(f"context equal in {_percent(reports)} of {num_calls}")
    if scored:
        drift = _drift(reports)
        if drift.num_tokens:
            kl = "unknown (no token at temperature 1)" if drift.kl is None else f"{drift.kl:.2e} (k3)"
            tell(
                f"{plural(drift.num_tokens, 'token')} scored under {held}: drift max {drift.max:.2e}, "
                f"mean {drift.mean:.2e} nats, mismatch KL {kl}"
            )
        else:
            say(f"nothing was sampled under {held}, so nothing was scored", style="red")


def _scores(report: RolloutReport) -> tuple[object, ...]:
    drift = report.drift
    kl = "" if drift.kl is None else f"{drift.kl:.1e}"
    figures = (f"{drift.max:.1e}", f"{drift.mean:.1e}", kl) if drift.num_tokens else ("", "", "")
    return (drift.num_tokens, *figures, ", ".join(f"{why} {n}" for why, n in report.unscored.items()))


def _complaints(reports: list[RolloutReport], tolerance: float) -> list[str]:
    """What is wrong, at most so many lines of it."""
    lines = []
    for report in reports:
        for d in report.differences:
            what = (
                "no such call" if d.what == "missing_call" else f"{d.what} {d.found}, recorded {d.recorded}"
            )
            lines.append(f"{d.trajectory_id} position {d.position} (call {d.call_id or '-'}): {what}")
        for o in report.outliers:
            lines.append(
                f"{o.trajectory_id} position {o.position} (call {o.call_id}, sampled token {o.index}, id "
                f"{o.token_id}): logprob {o.scored:.4f}, recorded {o.recorded:.4f}; tolerance {tolerance:g}"
            )
        if not report.accounted:
            lines.append(f"{report.rollout_id}: the account of its tokens does not add up")
        lines += report.complaints
    more = len(lines) - _NUM_NAMED
    return lines[:_NUM_NAMED] + ([f"... and {more} more (--json lists them)"] if more > 0 else [])


def _drift(reports: Iterable[RolloutReport]) -> Drift:
    from polar_mitm.verify import Drift

    return sum((report.drift for report in reports), Drift())


def _share(reports: Iterable[RolloutReport]) -> float:
    listed = list(reports)
    num = sum(r.num_calls for r in listed)
    return sum(r.num_equal for r in listed) / num if num else 1.0


def _percent(reports: Iterable[RolloutReport]) -> str:
    """Rounded down: 100 % are all."""
    return f"{int(_share(reports) * 1000) / 10:g} %"
