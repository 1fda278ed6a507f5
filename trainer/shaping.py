"""From outcomes to advantages, one per rollout, inside its group. No torch here."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polar_mitm_trainer.account import Account
from polar_mitm_trainer.advantages import group_advantages, is_usable
from polar_mitm_trainer.config import LossConfig, TrainConfig
from polar_mitm_trainer.finished import Outcome

_ENDED = ("completed", "timeout", "failed")  # a harness that exits with an error was judged all the same


@dataclass(frozen=True, slots=True)
class Verdict:
    """The advantage of a rollout, or why it has none. `reward` is the one used, after shaping."""

    advantage: float
    reward: float | None
    left_out: str | None


Judge = Callable[[Sequence[Outcome], TrainConfig], tuple[list[Verdict], Account]]
"""`judge`, or another one of its kind."""


def judge(rollouts: Sequence[Outcome], config: TrainConfig) -> tuple[list[Verdict], Account]:
    """One verdict per rollout, in this order, and the account of those that are left out.

    A rollout is left out when its record has holes, when it was interrupted or still runs, when it has no
    reward, or one that is no number (beyond 1e30 is none); the others of its group are not. One that failed
    or met its deadline counts as it was judged, whatever its exit code. A group is dropped when fewer than
    two of it are left, or when all of their rewards are the same.

    Raises:
        ValueError: the same rollout twice; shaping without its lengths.
    """
    if twice := [r for r, n in Counter(o.rollout_id for o in rollouts).items() if n > 1]:
        raise ValueError(f"rollout {twice[0]} is there twice")
    reasons = [unfit(outcome) for outcome in rollouts]
    rewards = [None if why else _shaped(o, config.loss) for o, why in zip(rollouts, reasons, strict=True)]
    groups = [outcome.group_id for outcome in rollouts]
    advantages = group_advantages(rewards, groups, config.advantage)
    rewarded = Counter(group for group, reward in zip(groups, rewards, strict=True) if reward is not None)
    account = Account()
    verdicts = []
    fates = dict.fromkeys(groups, "nobody_rewarded")
    for outcome, why, reward, advantage in zip(rollouts, reasons, rewards, advantages.tolist(), strict=True):
        if reward is not None:
            if math.isnan(advantage):
                why = "zero_variance" if rewarded[outcome.group_id] > 1 else "group_of_one"
            fates[outcome.group_id] = why or "trained"
        if why:
            leave_out(outcome, why, account)
        verdicts.append(Verdict(0.0 if why else advantage, reward, why))
    account.groups.update(fates.values())
    return verdicts, account


def leave_out(outcome: Outcome, why: str, account: Account) -> None:
    """Count a whole rollout as left out."""
    account.sampled += outcome.built.sampled
    account.masked.update(outcome.built.masked)
    account.left_out.update(outcome.built.quarantined)
    account.left_out[why] += outcome.built.trained
    account.rollouts[why] += 1


def by_group(rollouts: Sequence[Outcome]) -> dict[str, list[int]]:
    """The places of the rollouts of each group."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, outcome in enumerate(rollouts):
        places[outcome.group_id].append(place)
    return places


def overlong_penalty(num_tokens: int, length: int, buffer: int) -> float:
    """What DAPO adds to a reward (arXiv 2503.14476, eq. 13): 0 down to -1 over the `buffer` before `length`.

    >>> [overlong_penalty(n, 100, 20) for n in (80, 90, 100, 101)]
    [0.0, -0.5, -1.0, -1.0]
    """
    return min(0.0, max(-1.0, (length - buffer - num_tokens) / buffer))


def _shaped(outcome: Outcome, loss: LossConfig) -> float | None:
    if outcome.reward is None or loss.overlong != "shape":
        return outcome.reward
    if loss.overlong_length is None or loss.overlong_buffer is None:
        raise ValueError("overlong 'shape' needs overlong_length and overlong_buffer")
    return outcome.reward + overlong_penalty(
        outcome.built.trained, loss.overlong_length, loss.overlong_buffer
    )


def unfit(outcome: Outcome) -> str | None:
    """Why nothing of a rollout trains, whatever its group; None where something may."""
    if outcome.incomplete is not None:
        return "incomplete_rollout"
    if outcome.status not in _ENDED:
        return f"{outcome.status}_rollout"
    if outcome.reward is None:
        return "no_reward"
    return None if is_usable(outcome.reward) else "bad_reward"
