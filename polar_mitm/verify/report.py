"""What verification finds, per call, per rollout and in all. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from polar_mitm.verify.context import Difference, differences, unaccounted
from polar_mitm.verify.drift import Drift
from polar_mitm.verify.records import Path, Sampled, Span

UnscoredReason = Literal[
    "other_weights",  # sampled under weights that the scorer does not hold
    "mixed_weights",  # the weights changed while it was sampled
    "over_window",  # lies beyond what the engine can read in one request
    "refused",  # the scorer would not, or could not, score it: an id out of its vocabulary, say
]


class Account(Protocol):
    """A build's own account, in sampled tokens."""

    @property
    def sampled(self) -> int: ...
    @property
    def trained(self) -> int: ...
    @property
    def adds_up(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Outlier:
    """The first token of a call whose drift is beyond the tolerance; `position` counts from the trajectory's
    start, `index` from the call's first sampled token."""

    trajectory_id: str
    call_id: str
    position: int
    index: int
    token_id: int
    recorded: float
    scored: float


@dataclass(frozen=True, slots=True)
class CallDrift:
    """Drift of one call that trains, where it trains."""

    call_id: str
    trajectory_id: str
    weights: str | None
    drift: Drift
    outlier: Outlier | None


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """What was found in one rollout.

    `num_calls` counts calls that are in some trajectory, `num_equal` those whose context, ids and logprobs
    are equal in all of them; `differences` has the first difference of the others. `scored` is the number of
    tokens that were scored again, `unscored` counts those that train but were not, by reason.
    """

    rollout_id: str
    num_trajectories: int
    num_calls: int
    num_equal: int
    sampled: int
    trained: int
    accounted: bool
    differences: list[Difference]
    calls: list[CallDrift]
    unscored: dict[UnscoredReason, int]
    complaints: list[str]

    @property
    def drift(self) -> Drift:
        """Over all its calls."""
        return sum((c.drift for c in self.calls), Drift())

    @property
    def outliers(self) -> list[Outlier]:
        """The first token beyond the tolerance of each call that has one."""
        return [c.outlier for c in self.calls if c.outlier is not None]

    @property
    def sound(self) -> bool:
        """Whether nothing speaks against training on it."""
        return self.accounted and not (self.differences or self.outliers or self.unscored.get("refused"))


@dataclass(slots=True)
class Examined:
    """One rollout on its way to a report: equality is known, scores are still to come."""

    rollout_id: str
    paths: Sequence[Path]
    calls: Mapping[str, Sampled]
    account: Account
    differences: list[Difference]
    num_calls: int
    weights: str | None = None
    tolerance: float = np.inf
    drifts: list[CallDrift] = field(default_factory=list)
    unscored: dict[UnscoredReason, int] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def comparable(self, path: Path) -> list[Span]:
        """The spans of a trajectory that train and were sampled under the scorer's weights."""
        return [s for s in path.spans if s.mask_reason is None and self._reason(s) is None]

    def skip(self, paths: Iterable[Path]) -> None:
        """Count what trains, but cannot be compared."""
        for path in paths:
            for span in path.spans:
                if span.mask_reason is None and (reason := self._reason(span)):
                    self.leave_out(reason, span.end - span.sampled_start)

    def leave_out(self, reason: UnscoredReason, num_tokens: int) -> None:
        """Count tokens that are not compared."""
        self.unscored[reason] = self.unscored.get(reason, 0) + num_tokens

    def compare(self, path: Path, scores: NDArray[np.float64]) -> None:
        """Take in the scores [T] of a trajectory, NaN where there is none."""
        for span in self.comparable(path):
            call = self.calls[span.call_id]
            scored = scores[span.sampled_start : span.end]
            known = np.isfinite(scored)
            if not known.all():
                self.leave_out("over_window", int((~known).sum()))
            if not known.any():
                continue
            outlier = self._outlier(path, span, scored, call)
            drift = Drift.of(scored[known], call.logprobs[known], call.tempered)
            self.drifts.append(CallDrift(call.call_id, path.trajectory_id, call.weights, drift, outlier))

    def finished(self) -> RolloutReport:
        """The report."""
        trained = sum(int(path.loss_mask.sum()) for path in self.paths)
        return RolloutReport(
            rollout_id=self.rollout_id,
            num_trajectories=len(self.paths),
            num_calls=self.num_calls,
            num_equal=self.num_calls - len({d.call_id for d in self.differences if d.call_id}),
            sampled=self.account.sampled,
            trained=trained,
            accounted=self.account.adds_up and trained == self.account.trained,
            differences=self.differences,
            calls=sorted(self.drifts, key=lambda d: (d.trajectory_id, d.call_id)),
            unscored=dict(sorted(self.unscored.items())),
            complaints=self.complaints,
        )

    def _reason(self, span: Span) -> UnscoredReason | None:
        call = self.calls.get(span.call_id)
        if call is None or call.logprobs.size != span.end - span.sampled_start:
            return "refused"  # named among the differences
        if call.weights is None:
            return "mixed_weights"
        return None if self.weights in (None, call.weights) else "other_weights"

    def _outlier(self, path: Path, span: Span, scored: NDArray[np.float64], call: Sampled) -> Outlier | None:
        beyond = np.abs(scored - call.logprobs) > self.tolerance  # NaN is not
        if not beyond.any():
            return None
        at = int(np.argmax(beyond))
        position = span.sampled_start + at
        return Outlier(
            trajectory_id=path.trajectory_id,
            call_id=call.call_id,
            position=position,
            index=at,
            token_id=int(path.token_ids[position]),
            recorded=float(call.logprobs[at]),
            scored=float(scored[at]),
        )


def examine(rollout_id: str, paths: Sequence[Path], account: Account, calls: Iterable[Sampled]) -> Examined:
    """Check equality and the account of one rollout's trajectories against its recorded calls."""
    by_id = {call.call_id: call for call in calls}
    found = [difference for path in paths for difference in differences(path, by_id)]
    return Examined(
        rollout_id=rollout_id,
        paths=paths,
        calls=by_id,
        account=account,
        differences=found + unaccounted(paths) + twice(paths),
        num_calls=len({span.call_id for path in paths for span in path.spans}),
    )


def twice(paths: Sequence[Path]) -> list[Difference]:
    """Calls that train a second time."""
    seen: set[str] = set()
    found = []
    for path in paths:
        for span in path.spans:
            if span.mask_reason is None and span.call_id in seen:
                found.append(
                    Difference(path.trajectory_id, span.call_id, "loss_mask", span.sampled_start, 0, 1)
                )
            seen |= {span.call_id} if span.mask_reason is None else set()
    return found
