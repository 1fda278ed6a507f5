"""What `polar-mitm verify` shows, to people and to machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from polar_mitm.cli.output import plural, print_table, say, short, tell
from polar_mitm.cli.verify_input import Source

if TYPE_CHECKING:
    from polar_mitm.store.seal import SealCheck
    from polar_mitm.verify import Drift, RolloutReport

_NUM_NAMED = 10


@dataclass(frozen=True, slots=True)
class Found:
    """All that was found. `scored`: with an engine or a model, which holds `weights`."""

    builder: str
    reports: list[tuple[Source, RolloutReport]]
    seals: list[SealCheck]
    scored: bool
    weights: str | None
    tolerance: float

    @property
    def drift(self) -> Drift:
        """Over everything that was scored."""
        from polar_mitm.verify import Drift

        return sum((report.drift for _, report in self.reports), Drift())

    @property
    def sound(self) -> bool:
        """Whether nothing speaks against training on it; nor for it, where nothing could be scored."""
        untried = self.scored and not self.drift.num_tokens and any(r.trained for _, r in self.reports)
        return not untried and all(r.sound for _, r in self.reports) and all(s.ok for s in self.seals)

    def document(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            "sound": self.sound,
            "builder": self.builder,
            "weights": self.weights,
            "tolerance": self.tolerance,
            "context_equality": _share(r for _, r in self.reports),
            "drift": asdict(self.drift),
            "seals": [
                {"rollout_id": s.rollout_id, "ok": s.ok, "fault": str(s.fault) if s.fault else None}
                for s in self.seals
            ],
            "rollouts": [
                {"source": source, "sound": r.sound, "drift": asdict(r.drift)} | asdict(r)
                for source, r in self.reports
            ],
        }


def tell_found(found: Found) -> None:
    """A table, what is wrong, and the sum."""
    columns = "rollout,source,trajectories,calls,context equal,sampled,trained,quarantined"
    rows: list[tuple[object, ...]] = [
        (
            short(r.rollout_id),
            source,
            r.num_trajectories,
            r.num_calls,
            _percent([r]),
            r.sampled,
            r.trained,
            _counted(r.quarantined),
        )
        for source, r in found.reports
    ]
    reports = [report for _, report in found.reports]
    if found.scored:
        columns += ",scored,max drift,mean drift,mismatch KL,not scored"
        rows = [(*row, *_scores(report)) for row, report in zip(rows, reports, strict=True)]
    print_table(columns, rows)
    _tell_complaints(found, reports)
    num_calls = plural(sum(r.num_calls for r in reports), "call")
    tell(f"context equal in {_percent(reports)} of {num_calls}")
    if found.seals:
        tell(f"seals: {sum(s.ok for s in found.seals)} of {len(found.seals)} hold")
    drift = found.drift
    if drift.num_tokens:
        kl = "unknown (no token at temperature 1)" if drift.kl is None else f"{drift.kl:.2e} (k3)"
        tell(
            f"{plural(drift.num_tokens, 'token')} scored under {found.weights}: drift max {drift.max:.2e}, "
            f"mean {drift.mean:.2e} nats, mismatch KL {kl}"
        )
    elif found.scored:
        say(f"nothing was scored under {found.weights}: {_why_not(reports)}", style="red")


def _tell_complaints(found: Found, reports: list[RolloutReport]) -> None:
    """What is wrong, at most so many lines of it."""
    lines = [f"rollout {s.rollout_id}: {s.fault}" for s in found.seals if not s.ok]
    for report in reports:
        lines += [f"rollout {report.rollout_id}: {hole}" for hole in report.holes]
        for d in report.differences:
            place = f"{d.trajectory_id} position {d.position} (call {d.call_id or '-'})"
            values = "" if d.recorded == d.found else f" {d.found}, recorded {d.recorded}"
            lines.append(f"{place}: {d.what.replace('_', ' ')}{values}")
        for o in report.outliers:
            lines.append(
                f"{o.trajectory_id} position {o.position} (call {o.call_id}, sampled token {o.index}, id "
                f"{o.token_id}): logprob {o.scored:.4f}, recorded {o.recorded:.4f}"
            )
        if not report.accounted:
            lines.append(f"rollout {report.rollout_id}: the account of its tokens does not add up")
        lines += report.complaints
    for line in lines[:_NUM_NAMED]:
        tell(line, style="red")
    if len(lines) > _NUM_NAMED:
        tell(f"... and {len(lines) - _NUM_NAMED} more (--json lists them)", style="red")


def _scores(report: RolloutReport) -> tuple[object, ...]:
    drift = report.drift
    kl = "" if drift.kl is None else f"{drift.kl:.1e}"
    figures = (f"{drift.max:.1e}", f"{drift.mean:.1e}", kl) if drift.num_tokens else ("", "", "")
    return (drift.num_tokens, *figures, _counted(report.unscored))


def _why_not(reports: Iterable[RolloutReport]) -> str:
    """Why there is no score at all: the first refusal, else the reasons with their tokens."""
    unscored: Counter[str] = Counter()
    for report in reports:
        if report.complaints:
            return report.complaints[0]
        unscored.update(report.unscored)
    return _counted(unscored) or "no token trains"


def _counted(tokens: Mapping[Any, int]) -> str:
    """Reasons, each with its number of tokens."""
    return ", ".join(f"{why} {n}" for why, n in tokens.items())


def _share(reports: Iterable[RolloutReport]) -> float:
    listed = list(reports)
    num = sum(r.num_calls for r in listed)
    return sum(r.num_equal for r in listed) / num if num else 1.0


def _percent(reports: Iterable[RolloutReport]) -> str:
    """Rounded down: 100 % are all."""
    return f"{int(_share(reports) * 1000) / 10:g} %"
