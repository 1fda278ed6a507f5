"""The algorithm as the papers write it: Python floats, one token at a time, slow on purpose.

It shares no code with the trainer, and no idea but the formulas. A trajectory here is a list of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Token:
    """A trained token: logprobs in nats under the learner, the engine, the learner as it was, the reference.

    `held` is the learner's where a paper stops the gradient: a derivative moves `logprob` alone.
    """

    logprob: float
    held: float
    behaviour: float
    old: float
    reference: float
    advantage: float
    weight: float


@dataclass
class Rules:
    """What LossConfig says, all of it said."""

    name: str
    clip_low: float
    clip_high: float
    old_policy: str = "recomputed"
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    correction: str = "none"
    cap: float = 2.0
    floor: float = 0.0


def loss(trajectories: list[list[Token]], rules: Rules) -> float:
    """The sum over all tokens of weight x (correction x term + coefficient x KL)."""
    total = 0.0
    for trajectory in trajectories:
        for token in trajectory:
            term = correction(token, trajectory, rules) * policy_term(token, trajectory, rules)
            total += token.weight * (term + rules.kl_coefficient * kl(token, rules))
    return total


def old(token: Token, rules: Rules) -> float:
    return token.behaviour if rules.old_policy == "behaviour" else token.old


def clip(value: float, rules: Rules) -> float:
    return min(max(value, 1 - rules.clip_low), 1 + rules.clip_high)


def policy_term(token: Token, trajectory: list[Token], rules: Rules) -> float:
    if rules.name == "sft":
        return -token.advantage * token.logprob
    if rules.name == "cispo":
        weight = clip(math.exp(token.held - old(token, rules)), rules)
        return -weight * token.advantage * token.logprob
    if rules.name == "gspo":
        mean = sum(other.held - old(other, rules) for other in trajectory) / len(trajectory)
        ratio = math.exp(mean) * math.exp(token.logprob) / math.exp(token.held)
    else:
        ratio = math.exp(token.logprob - old(token, rules))
    return -min(ratio * token.advantage, clip(ratio, rules) * token.advantage)


def kl(token: Token, rules: Rules) -> float:
    difference = token.logprob - token.reference
    if rules.kl_estimator == "k3":
        return math.exp(-difference) + difference - 1
    held = token.held - token.reference
    return held + (difference**2 - held**2) / 2


def correction(token: Token, trajectory: list[Token], rules: Rules) -> float:
    if rules.correction == "none":
        return 1.0
    tokens = trajectory if rules.correction.startswith("sequence") else [token]
    ratio = math.exp(sum(other.old - other.behaviour for other in tokens))
    if rules.correction.endswith("truncate"):
        return min(max(ratio, rules.floor), rules.cap)
    if not rules.floor <= ratio <= rules.cap:
        return 0.0
    return 1.0 if rules.old_policy == "behaviour" else ratio


def slope(trajectory: list[Token], token: Token, rules: Rules, step: float = 1e-6) -> float:
    """The loss's derivative by the logprob of one of a trajectory's tokens, by a central difference."""
    at = token.logprob
    token.logprob = at + step
    above = loss([trajectory], rules)
    token.logprob = at - step
    below = loss([trajectory], rules)
    token.logprob = at
    return (above - below) / (2 * step)


def advantages(
    rewards: list[float | None], groups: list[str], std: bool, leave_one_out: bool
) -> list[float | None]:
    """Of each rollout; None where it has none."""
    result: list[float | None] = []
    for reward, group in zip(rewards, groups, strict=True):
        all_of_it = [r for r, g in zip(rewards, groups, strict=True) if g == group and r is not None]
        if reward is None or len(all_of_it) < 2 or max(all_of_it) == min(all_of_it):
            result.append(None)
            continue
        mean = sum(all_of_it) / len(all_of_it)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in all_of_it) / (len(all_of_it) - 1))
        others = (sum(all_of_it) - reward) / (len(all_of_it) - 1)
        baseline = others if leave_one_out else mean
        result.append((reward - baseline) / ((deviation + 1e-4) if std else 1.0))
    return result
