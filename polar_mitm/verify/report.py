"""What verification finds, per call, per rollout and in all. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from polar_mitm.verify.context import Difference, differences
from polar_mitm.verify.drift import Drift
from polar_mitm.verify.records import Path, Sampled, Span

UnscoredReason = Literal[
    "other_weights",  # sampled under weights that the scorer does not hold
    "mixed_weights",  # the weights changed while it was sampled
    "other_tokenizer",  # its ids mean something else to the scorer
    "constrained",  # sampled under a grammar: its logprobs are not of the model's own softmax
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
    def quarantined(self) -> Mapping[Any, int]: ...
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
    are equal in all of them; `differences` has the first difference of the others. `sampled` and `trained`
    are counted here; `accounted` says that the build's account adds up and says the same. `calls` are those
    that were scored, `unscored` counts the tokens that train but were not, by reason. `quarantined` is the
    account's own; `holes` says what is wrong with the record itself.
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
    quarantined: dict[str, int]
    holes: list[str]

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
        found = self.holes or self.differences or self.outliers or self.unscored.get("refused")
        return self.accounted and not found


class Examination:
    """One rollout on its way to a report. Trajectories come once, one after the other, and are not kept.

    Args:
        calls: all calls of the rollout that can be read.
        num_unreadable: the tokens that its other calls sampled.
        holes: what is wrong with its record, in sentences.
        weights: what the scorer holds (`weights_name`); calls sampled under others are left out and counted.
            None: whatever the calls were sampled under.
        tokenizer: the scorer's, likewise; "" where unknown.
        tolerance: a token whose |drift| in nats is greater is an outlier.
    """

    def __init__(
        self,
        rollout_id: str,
        calls: Iterable[Sampled],
        *,
        num_unreadable: int = 0,
        holes: Sequence[str] = (),
        weights: str | None = None,
        tokenizer: str = "",
        tolerance: float = np.inf,
    ) -> None:
        self._rollout_id, self._tolerance = rollout_id, tolerance
        self._num_unreadable, self._holes = num_unreadable, list(holes)
        self._weights, self._tokenizer = weights, tokenizer
        self._calls = {call.call_id: call for call in calls}
        self._seen: set[str] = set()
        self._trained: set[str] = set()
        self._num_paths = self._num_trained = 0
        self._differences: list[Difference] = []
        self._drifts: list[CallDrift] = []
        self._unscored: Counter[UnscoredReason] = Counter()
        self._complaints: list[str] = []

    def check(self, path: Path) -> list[Span]:
        """Compare a trajectory with the recorded calls; returns the spans whose tokens are to be scored."""
        self._num_paths += 1
        self._num_trained += int(path.loss_mask.sum())
        self._differences += differences(path, self._calls)
        self._seen |= {span.call_id for span in path.spans}
        comparable = []
        for span in path.spans:
            if span.mask_reason is not None:
                continue
            if span.call_id in self._trained:
                again = Difference(
                    path.trajectory_id, span.call_id, "trained_twice", span.sampled_start, 0, 1
                )
                self._differences.append(again)
            self._trained.add(span.call_id)
            if reason := self._reason(span):
                self._unscored[reason] += span.end - span.sampled_start
            else:
                comparable.append(span)
        return comparable

    def compare(self, path: Path, spans: Iterable[Span], scores: NDArray[np.float64]) -> None:
        """Take in the scores [T] of a trajectory, NaN where there is none, as `check` asked for."""
        for span in spans:
            call, scored = self._calls[span.call_id], scores[span.sampled_start : span.end]
            known = np.isfinite(scored)
            if not known.all():
                self._unscored["over_window"] += int((~known).sum())
            if known.any():
                drift = Drift.of(scored[known], call.logprobs[known], call.tempered)
                outlier = self._outlier(path, span, scored, call)
                self._drifts.append(CallDrift(call.call_id, path.trajectory_id, call.weights, drift, outlier))

    def refused(self, path: Path, spans: Iterable[Span], why: str) -> None:
        """Note that the scorer would not."""
        self._unscored["refused"] += sum(span.end - span.sampled_start for span in spans)
        self._complaints.append(f"the scorer refused {path.trajectory_id}: {why}")

    def damaged(self, why: str) -> None:
        """Note that there is no reading on in the trajectories."""
        self._holes.append(why)

    def finished(self, account: Account) -> RolloutReport:
        """The report, once all trajectories have been seen."""
        num_sampled = self._num_unreadable + sum(call.num_sampled for call in self._calls.values())
        return RolloutReport(
            rollout_id=self._rollout_id,
            num_trajectories=self._num_paths,
            num_calls=len(self._seen),
            num_equal=len(self._seen - {d.call_id for d in self._differences}),
            sampled=num_sampled,
            trained=self._num_trained,
            accounted=account.adds_up
            and (account.sampled, account.trained) == (num_sampled, self._num_trained),
            differences=self._differences,
            calls=sorted(self._drifts, key=lambda d: (d.trajectory_id, d.call_id)),
            unscored=dict(sorted(self._unscored.items())),
            complaints=self._complaints,
            quarantined=dict(account.quarantined),
            holes=self._holes,
        )

    def _reason(self, span: Span) -> UnscoredReason | None:
        call = self._calls.get(span.call_id)
        if call is None or call.logprobs.size != span.end - span.sampled_start:
            return "refused"  # named among the differences
        if call.weights is None:
            return "mixed_weights"
        if self._weights not in (None, call.weights):
            return "other_weights"
        if "" not in (self._tokenizer, call.tokenizer) and self._tokenizer != call.tokenizer:
            return "other_tokenizer"
        return "constrained" if call.constrained else None

    def _outlier(self, path: Path, span: Span, scored: NDArray[np.float64], call: Sampled) -> Outlier | None:
        beyond = np.abs(scored - call.logprobs) > self._tolerance  # NaN is not
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
