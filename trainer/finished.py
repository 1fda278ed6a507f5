"""What became of a rollout, the same out of a store and out of memory. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from polar_mitm.columns import RolloutColumns
from polar_mitm.reconstruct import Builder, BuildReport, build
from polar_mitm.store.trajectories import BuiltTrajectory
from polar_mitm.types import Message, ModelCall, Rollout, RolloutStatus
from polar_mitm_trainer.tool_calls import is_malformed


class Span(Protocol):
    """Where a call lies in a trajectory, as in `reconstruct.CallSpan`."""

    @property
    def call_id(self) -> str: ...
    @property
    def sampled_start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def mask_reason(self) -> str | None: ...
    @property
    def truncated(self) -> bool: ...
    @property
    def policy_version(self) -> str | None: ...
    @property
    def policy_version_last(self) -> str | None: ...


class TrajectoryArrays(BuiltTrajectory, Protocol):
    """A trajectory: reconstruction's, or a stored one. Arrays [T] are int32, uint8 and float32 in nats."""

    @property
    def spans(self) -> Sequence[Span]: ...


class Built(msgspec.Struct, frozen=True):
    """The account of a rollout's build in sampled tokens, as in `reconstruct.BuildReport`."""

    num_calls: int
    sampled: int
    trained: int
    masked: dict[str, int]
    quarantined: dict[str, int]

    @classmethod
    def of(cls, report: BuildReport) -> Built:
        """Without what only people read."""
        masked: dict[str, int] = {why: n for why, n in report.masked.items()}
        quarantined: dict[str, int] = {why: n for why, n in report.quarantined.items()}
        return cls(report.num_calls, report.sampled, report.trained, masked, quarantined)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that decides a rollout's advantage.

    `reward` is None where nobody judged it. `incomplete` says why its record has holes. `truncated`: it was
    cut off, by its deadline or in the middle of its last answer. `built` is the account of all its tokens.
    """

    rollout_id: str
    group_id: str
    reward: float | None
    status: RolloutStatus
    incomplete: str | None
    truncated: bool
    built: Built

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        built: Built,
        last_spans: Iterable[tuple[str, Span]],
        *,
        reward: float | None,
        group_id: str | None = None,
    ) -> Outcome:
        """From its record and the (role, last span) of each of its trajectories.

        A rollout without a group is one of its own.
        """
        cut_off = (role == "main" and s.truncated and s.mask_reason is None for role, s in last_spans)
        return Outcome(
            rollout_id=rollout.rollout_id,
            group_id=group_id or rollout.group_id or rollout.rollout_id,
            reward=reward,
            status=rollout.status,
            incomplete=rollout.incomplete,
            truncated=rollout.status == "timeout" or any(cut_off),
            built=built,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A rollout that has ended: its outcome, its trajectories, and which calls had malformed tool calls.

    `trajectories` may be some of the rollout's: tokens of the others are accounted for as not selected.
    """

    outcome: Outcome
    trajectories: tuple[TrajectoryArrays, ...]
    malformed: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, outcome: Outcome, trajectories: Sequence[TrajectoryArrays], answers: Mapping[str, Message]
    ) -> Finished:
        """`answers` are what the engine said, by call id; a call without one is not malformed."""
        malformed = frozenset(
            span.call_id
            for trajectory in trajectories
            for span in trajectory.spans
            if span.mask_reason is None and not span.truncated  # what was cut off is not the model's fault
            if span.call_id in answers and is_malformed(answers[span.call_id])
        )
        return cls(outcome, tuple(trajectories), malformed)

    @classmethod
    def of_calls(
        cls,
        rollout: Rollout,
        calls: Sequence[ModelCall] | RolloutColumns,
        answers: Mapping[str, Message],
        *,
        reward: float | None,
        builder: Builder = "forest",
        max_tokens: int | None = None,
    ) -> Finished:
        """Of a rollout and all its calls, rebuilt as `reconstruct.build` is told.

        Raises:
            ValueError: as `build` does.
        """
        built, report = build(calls, rollout=rollout, builder=builder, max_tokens=max_tokens)
        trajectories = list(built)
        last_spans = [(t.role, t.spans[-1]) for t in trajectories]
        outcome = Outcome.of(rollout, Built.of(report), last_spans, reward=reward)
        return cls.of(outcome, [t for t in trajectories if t.num_trained], answers)
