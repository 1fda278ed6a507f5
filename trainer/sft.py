"""Rejection-sampled supervised fine-tuning: what earned enough trains, all else is left out. No torch here.

The machinery is the batch job's, with another judge and the loss "sft":

    TrainingSet(..., judge=accepting(1.0)); samples_of(..., judge=accepting(1.0))
"""

from __future__ import annotations

from collections.abc import Sequence

from polar_mitm_trainer.account import Account
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.finished import Outcome
from polar_mitm_trainer.shaping import Judge, Verdict, by_group, leave_out, unfit


def accepting(threshold: float) -> Judge:
    """A judge that gives a reward of at least `threshold` the advantage 1, whatever its group."""

    def judge(rollouts: Sequence[Outcome], config: TrainConfig) -> tuple[list[Verdict], Account]:
        account = Account()
        verdicts = []
        for outcome in rollouts:
            why = unfit(outcome)
            if why is None and not (outcome.reward is not None and outcome.reward >= threshold):
                why = "rejected"
            verdicts.append(Verdict(0.0 if why else 1.0, outcome.reward, why))
            if why:
                leave_out(outcome, why, account)
        for places in by_group(rollouts).values():
            taken = any(verdicts[place].left_out is None for place in places)
            account.groups["trained" if taken else "rejected"] += 1
        return verdicts, account

    return judge
