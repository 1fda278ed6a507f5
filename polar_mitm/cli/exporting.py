"""What `polar-mitm export --format` writes for other trainers: trajectories with their rollouts' rewards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from polar_mitm.cli.exits import fail
from polar_mitm.cli.output import plural, say
from polar_mitm.rewards import which_counts
from polar_mitm.types import EVALUATION, Rollout

if TYPE_CHECKING:
    from polar_mitm.export import Judged
    from polar_mitm.export.chat import Conversation
    from polar_mitm.reconstruct import BuildReport, Trajectory
    from polar_mitm.store import StoreReader


class Format(StrEnum):
    """Whose records `export` writes."""

    parquet = "parquet"
    trl = "trl"
    verl = "verl"
    nemo_gym = "nemo-gym"
    sft_chat = "sft-chat"


@dataclass
class Selection:
    """Which trajectories go out: with a token that trains, of rollouts that were judged, well enough.

    `left_out` counts rollouts by reason; `num_unsaid` trajectories whose request was not stored.
    """

    reward: str | None = None
    min_reward: float | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    num_unsaid: int = 0

    def judged(
        self, reader: StoreReader, built: Iterable[tuple[Rollout, BuildReport, Sequence[Trajectory]]]
    ) -> Iterator[Judged]:
        """Them, one rollout's in memory at a time; the last verdict of a name counts."""
        from polar_mitm.export import Judged

        found = reader.rewards()
        names = list(dict.fromkeys(each.name for each in found))
        name = which_counts(names, self.reward)
        if names and name not in names:
            fail(f"--reward: say which verdict counts: {', '.join(map(repr, names))}")
        rewards = {each.rollout_id: each.value for each in found if each.name == name}
        for rollout, _, trajectories in built:
            reward = rewards.get(rollout.rollout_id)
            if (rollout.group_id or "").startswith(EVALUATION):
                self.left_out["of evaluations"] += 1
            elif rollout.incomplete:
                self.left_out["incomplete"] += 1
            elif reward is None:
                self.left_out[f"no {name or 'reward'!r}"] += 1
            elif not math.isfinite(reward):
                self.left_out[f"{name} {reward}"] += 1
            elif self.min_reward is not None and not reward >= self.min_reward:
                self.left_out[f"{name} below {self.min_reward:g}"] += 1
            else:
                trained = [each for each in trajectories if each.num_trained]
                self.left_out["nothing that trains"] += not trained
                yield from (Judged(each, reward) for each in trained)

    def said(self, reader: StoreReader, items: Iterable[Judged]) -> Iterator[Conversation]:
        """Each with the calls of its rollout, read once for all of the rollout's trajectories."""
        rollout_id, calls = "", {}
        for item in items:
            if item.trajectory.rollout_id != rollout_id:
                rollout_id = item.trajectory.rollout_id
                calls = {call.call_id: call for call in reader.calls(rollout_id, wire=True)}
            if calls[item.trajectory.spans[-1].call_id].upstream_body:
                yield item, calls
            else:
                self.num_unsaid += 1

    @property
    def counts(self) -> dict[str, int]:
        """`left_out`, without the reasons that nothing had."""
        return {why: n for why, n in self.left_out.items() if n}

    def tell(self) -> None:
        """How many were left out, and why."""
        if reasons := ", ".join(f"{n} {why}" for why, n in self.counts.items()):
            say(f"rollouts left out: {reasons}", style="yellow")
        if self.num_unsaid:
            unsaid = plural(self.num_unsaid, "trajectory", "trajectories")
            say(f"left out: {unsaid} whose last request was not stored", style="yellow")


def write(
    format: Format,
    reader: StoreReader,
    built: Iterable[tuple[Rollout, BuildReport, Sequence[Trajectory]]],
    selection: Selection,
    out: Path,
    force: bool,
) -> int:
    """How many trajectories were written. Raises FileExistsError and OSError as the exporters do."""
    from polar_mitm import export

    judged = selection.judged(reader, built)
    match format:
        case Format.trl:
            return export.export_trl(judged, out, force=force)
        case Format.verl:
            return export.export_verl(judged, out, force=force)
        case Format.nemo_gym:
            return export.export_nemo_gym(selection.said(reader, judged), out, force=force)
        case Format.sft_chat:
            return export.export_sft_chat(selection.said(reader, judged), out, force=force)
        case Format.parquet:
            raise AssertionError("our own format has no rewards")
