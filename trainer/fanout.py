"""From rollouts to samples: advantages go to trajectories, what must not train is masked. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polar_mitm.upstream.engine import step_of
from polar_mitm_trainer.account import Account, NothingToLearn, Splitting
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.finished import Finished, Span
from polar_mitm_trainer.loss_defaults import resolve
from polar_mitm_trainer.samples import Sample, weigh
from polar_mitm_trainer.shaping import Judge, by_group, judge


def samples_of(
    rollouts: Sequence[Finished],
    config: TrainConfig,
    *,
    current_step: int | None = None,
    judge: Judge = judge,
) -> tuple[list[Sample], Account]:
    """The samples of one optimiser step, weighted, and the account of every sampled token of its rollouts.

    Advantages are per rollout inside its group (`shaping.judge`, or another `judge`), then each goes to all
    trained tokens of the rollout's trajectories, but for those of malformed tool calls where
    `config.advantage` has another one for them. Then the tokens of rollouts that were cut off are masked
    where `config.loss` says so, and those of calls whose weights are more than `max_staleness` steps behind
    `current_step`, or are not those of a step up to it ("other_version"). None as `current_step` masks no
    call: recorded data.

    Raises:
        NothingToLearn: not one token trains.
        ValueError: a rollout or a token is there twice; as `judge` and `weigh` do.
    """
    outcomes = [each.outcome for each in rollouts]
    verdicts, account = judge(outcomes, config)
    samples: list[Sample] = []
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if verdict.left_out is None:
            samples += _fan_out(rollout, verdict.advantage, config, current_step, account)
    for places in by_group(outcomes).values():
        kept = [place for place in places if verdicts[place].left_out is None]
        if kept:
            rewards = [outcomes[place].reward or 0.0 for place in kept]
            account.splitting += Splitting.of_group(rewards, [len(rollouts[p].trajectories) for p in kept])
    if not samples:
        raise NothingToLearn(account)
    loss = resolve(config.loss)
    assert loss.aggregation is not None
    return weigh(samples, loss.aggregation, constant=loss.constant), account


def _fan_out(
    rollout: Finished, advantage: float, config: TrainConfig, current_step: int | None, account: Account
) -> list[Sample]:
    """The samples of one rollout, without weights."""
    outcome, built = rollout.outcome, rollout.outcome.built
    selected = sum(int(t.loss_mask.sum()) for t in rollout.trajectories)
    if selected > built.trained:
        raise ValueError(
            f"rollout {outcome.rollout_id}: its trajectories train {selected} tokens, its build "
            f"{built.trained}: some of them are there twice"
        )
    account.sampled += built.sampled
    account.masked.update(built.masked)
    account.left_out.update(built.quarantined)
    if built.trained > selected:
        account.left_out["not_selected"] += built.trained - selected
    overlong = config.loss.overlong == "mask" and outcome.truncated
    judged = config.advantage.invalid_tool_call
    samples = []
    for trajectory in rollout.trajectories:
        mask = trajectory.loss_mask.copy()
        advantages = np.full(mask.size, advantage, np.float32)
        for span in trajectory.spans:
            if span.mask_reason is not None:
                continue
            own = slice(span.sampled_start, span.end)
            why = "overlong" if overlong else _stale(span, config.loss.max_staleness, current_step)
            if why:
                account.masked[why] += int(mask[own].sum())
                mask[own] = 0
            elif span.call_id in rollout.malformed:
                account.malformed += int(mask[own].sum())
                if judged is not None:
                    advantages[own] = judged
        if not (num_trained := int(mask.sum())):
            continue
        account.trained += num_trained
        samples.append(
            Sample(
                trajectory_id=trajectory.trajectory_id,
                rollout_id=outcome.rollout_id,
                group_id=outcome.group_id,
                token_ids=trajectory.token_ids,
                loss_mask=mask,
                behaviour_logprobs=np.where(mask == 1, trajectory.behaviour_logprobs, np.float32(0)),
                advantages=np.where(mask == 1, advantages, np.float32(0)),
                weights=np.zeros(mask.size, np.float32),
                policy_version=trajectory.policy_version_min,
            )
        )
    account.rollouts["trained" if samples else "all_masked" if built.sampled else "nothing_sampled"] += 1
    return samples


def _stale(span: Span, max_staleness: int | None, current_step: int | None) -> str | None:
    """Why a call's tokens are too far from the policy. Where weights changed in it, the oldest decide."""
    if max_staleness is None or current_step is None:
        return None
    versions = [span.policy_version, span.policy_version_last or span.policy_version]
    steps = [step for step in map(step_of, versions) if step is not None]
    if len(steps) < len(versions) or max(steps) > current_step:
        return "other_version"
    return "stale" if current_step - min(steps) > max_staleness else None
