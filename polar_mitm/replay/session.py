"""A replay as it goes: each live request in, what to do with it out, and a report at the end.

Without IO: an addon asks `take` for every model call of the fresh run and serves what it is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct, field

from polar_mitm.dialects.responses_state import SOCKET_METHOD
from polar_mitm.replay.compare import Divergence
from polar_mitm.replay.match import Match, Recording
from polar_mitm.replay.rules import RULES, VERSION, Rule
from polar_mitm.types import ModelCall, Wire

MAX_DIVERGENCES = 20

Outcome = Literal[
    "same",  # asked exactly what the recorded call asked
    "diverged",  # it is the recorded call, but a field differs: answered as recorded all the same
    "unmatched",  # no recorded call is left that it could be: answered with an error
    "beyond",  # the recorded run was cut off, and here the fresh one goes on: answered with an error
    "live",  # after a fork: the engine's turn
]


class Step(Struct):
    """One request of the fresh run. `recorded` is the call that answered it (or that the fork is at, or the
    nearest that did not).

    `divergences` are the first of `num_divergences`, `rules` the normalisation that the request needed.
    """

    number: int
    request: str
    outcome: Outcome
    recorded: str | None = None
    num_divergences: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    note: str | None = None

    @property
    def first(self) -> Divergence | None:
        """The first field that differs."""
        return self.divergences[0] if self.divergences else None


class ReplayReport(Struct):
    """What a replay came to. `unreached` are recorded calls that the fresh run never made."""

    rollout_id: str
    normalisation_version: int
    num_recorded: int
    num_served: int
    unreached: list[str]
    steps: list[Step]
    forked_at: str | None = None
    forked: bool = False

    @property
    def faithful(self) -> bool:
        """Every recorded call was reached (up to the fork, where one is asked for), and none differed."""
        same = all(step.outcome in ("same", "beyond", "live") and not step.note for step in self.steps)
        return same and not self.unreached and self.forked == (self.forked_at is not None)


class Replay:
    """See the module. Not for several threads at once."""

    def __init__(
        self,
        rollout_id: str,
        calls: Sequence[ModelCall],
        *,
        fork_at: str | None = None,
        cut_off: bool = False,
        rules: Sequence[Rule] = RULES,
    ) -> None:
        """`cut_off`: the recorded run did not end by itself, so requests after its last one are no surprise.

        Raises:
            ValueError: `fork_at` is none of the calls.
        """
        self._rollout_id = rollout_id
        self._recording = Recording(calls, rules)
        self._cut_off = cut_off
        forked = next((call for call in calls if call.call_id == fork_at), None)
        if fork_at is not None and forked is None:
            raise ValueError(f"{fork_at} is no call of rollout {rollout_id}")
        self._fork_at = None if forked is None else forked.answer_of or forked.call_id
        self._fork_seq = None if forked is None else forked.seq
        self._forked = False
        self._steps: list[Step] = []

    @property
    def websocket(self) -> bool:
        """Whether the recorded run spoke over a WebSocket; a fresh one then has to, and else must not."""
        return any(call.wire.method == SOCKET_METHOD for call in self._recording.calls)

    def take(self, dialect: str, wire: Wire) -> tuple[Step, ModelCall | None]:
        """Decide on a request: with the recorded call whose answer it gets, if any."""
        match = self._recording.match(dialect, wire)
        step = Step(len(self._steps), f"{wire.method} {wire.path}", "same", rules=match.rules)
        self._steps.append(step)
        live = self._is_live(match)
        self._forked = self._forked or live
        if not live or (match.call is not None and match.call.call_id == self._fork_at):
            step.num_divergences = len(match.divergences)
            step.divergences = match.divergences[:MAX_DIVERGENCES]
            step.recorded = match.call.call_id if match.call else None
        if live:
            step.outcome = "live"
            return step, None
        if match.call is not None:
            self._recording.take(match.call)
            step.outcome = "diverged" if match.divergences else "same"
            return step, match.call
        if self._cut_off and not self._recording.waiting:
            step.outcome = "beyond"
            return step, None
        step.outcome = "unmatched"
        step.recorded = match.nearest.call_id if match.nearest else None
        if match.again is not None:
            step.note = f"asked again: call {match.again} was answered before"
        elif match.nearest is None:
            step.note = "no recorded call is left"
        return step, None

    def others(self, call_id: str) -> list[ModelCall]:
        """The further answers to the request of a recorded call."""
        return self._recording.others.get(call_id, [])

    def _is_live(self, match: Match) -> bool:
        if self._fork_seq is None:
            return False
        if not any(call.seq < self._fork_seq for call in self._recording.waiting.values()):
            return True
        if match.call is not None and match.call.seq >= self._fork_seq:
            return True
        # Another thread may still be on its way through the record; whatever differs now is the fork's doing.
        return self._forked and (match.call is None or bool(match.divergences))

    def report(self) -> ReplayReport:
        """What has come of it so far."""
        limit = self._fork_seq
        due = [call for call in self._recording.calls if limit is None or call.seq < limit]
        unreached = [call.call_id for call in due if call.call_id in self._recording.waiting]
        return ReplayReport(
            self._rollout_id,
            VERSION,
            len(due),
            len(due) - len(unreached),
            unreached,
            self._steps,
            self._fork_at,
            self._forked,
        )
