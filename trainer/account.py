"""What became of every sampled token of a step. No torch here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from polar_mitm.errors import StoreError


@dataclass(slots=True)
class Splitting:
    """Whether splitting pays: reward against trajectories per rollout, both less their group's mean.

    Sums over rollouts, so that steps add.
    """

    num_rollouts: int = 0
    num_trajectories: int = 0
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 2)))

    @classmethod
    def of_group(cls, rewards: list[float], num_trajectories: list[int]) -> Splitting:
        """Of the rollouts of one group."""
        both = np.array([rewards, num_trajectories], np.float64)
        both -= both.mean(axis=1, keepdims=True)
        return cls(len(rewards), sum(num_trajectories), both @ both.T)

    @property
    def correlation(self) -> float | None:
        """Pearson's, inside groups; None where rewards or numbers of trajectories do not vary.

        Well above 0 over many steps: rollouts of more trajectories are rewarded better.
        """
        scale = float(np.sqrt(self.squares[0, 0] * self.squares[1, 1]))
        return float(self.squares[0, 1]) / scale if scale > 1e-12 else None

    def __add__(self, other: Splitting) -> Splitting:
        return Splitting(
            self.num_rollouts + other.num_rollouts,
            self.num_trajectories + other.num_trajectories,
            self.squares + other.squares,
        )


@dataclass(slots=True)
class Account:
    """Each sampled token of the rollouts of a step is trained, masked, or left out, once.

    `masked` are context in what trains: the build's reasons, "overlong", "stale" and "other_version".
    `left_out` are in nothing that trains: the build's reasons for quarantine, what became of the rollout, and
    "not_selected". Both in tokens by reason. `rollouts` and `groups` count those by what became of them,
    "trained" or a reason. `malformed` counts the trained tokens of malformed tool calls.
    """

    sampled: int = 0
    trained: int = 0
    masked: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    rollouts: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    malformed: int = 0
    splitting: Splitting = field(default_factory=Splitting)

    @property
    def adds_up(self) -> bool:
        """Whether no token is lost, or counted twice."""
        return self.sampled == self.trained + self.masked.total() + self.left_out.total()

    def __add__(self, other: Account) -> Account:
        return Account(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def metrics(self) -> dict[str, float]:
        """As figures of a step: tokens, rollouts and groups by what became of them."""
        found = {"tokens/sampled": self.sampled, "tokens/trained": self.trained}
        for name in ("masked", "left_out"):
            counts: Counter[str] = getattr(self, name)
            found[f"tokens/{name}"] = counts.total()
            found |= {f"tokens/{name}/{why}": n for why, n in counts.items()}
        found |= {f"rollouts/{why}": n for why, n in self.rollouts.items()}
        found |= {f"groups/{why}": n for why, n in self.groups.items()}
        found["tokens/malformed_tool_calls"] = self.malformed
        figures = {name: float(n) for name, n in found.items()}
        if self.splitting.num_rollouts:
            per_rollout = self.splitting.num_trajectories / self.splitting.num_rollouts
            figures["splitting/trajectories_per_rollout"] = per_rollout
        if (correlation := self.splitting.correlation) is not None:
            figures["splitting/reward_correlation"] = correlation
        return figures

    def told(self) -> str:
        """In a sentence, for people."""
        parts = [f"{n} {why}" for why, n in sorted(self.rollouts.items())]
        groups = [f"{n} {why}" for why, n in sorted(self.groups.items())]
        return f"rollouts: {', '.join(parts) or 'none'}; groups: {', '.join(groups) or 'none'}"


class DataError(StoreError):
    """Nothing can be trained on what was asked for; the message says why, and what to do."""


class NothingToLearn(DataError):
    """Rollouts of which no token trains. `account` says what became of each."""

    def __init__(self, account: Account) -> None:
        reasons = ", ".join(f"{why} {n}" for why, n in (account.masked + account.left_out).most_common())
        super().__init__(
            f"nothing to learn from {account.rollouts.total()} rollouts: {account.told()}; "
            f"of {account.sampled} sampled tokens: {reasons or 'none'}"
        )
        self.account = account
