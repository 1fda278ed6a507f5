"""Rejection sampling: what is accepted, the loss against plain cross-entropy, and a job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from polar_mitm_trainer.account import NothingToLearn
from polar_mitm_trainer.batch import BatchJob, BatchRun, StepDone
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.fanout import samples_of
from polar_mitm_trainer.learner import Learner
from polar_mitm_trainer.sft import accepting
from tests.trainer.stores import groups, rollout
from tests.trainer.tiny import tiny_model, tiny_store


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    torch.set_num_threads(2)
    model = tiny_model(tmp_path_factory.mktemp("model"))
    return TrainConfig.model_validate(
        {"policy": {"model": str(model)}, "optimiser": {"lr": 0.01}, "loss": {"name": "sft"}}
    )


def test_what_is_accepted(config: TrainConfig) -> None:
    recorded = [
        *(rollout(f"alike{n}", "alike", 1.0) for n in range(2)),  # nothing for GRPO, all for this
        rollout("good", "g", 2.0),
        rollout("bad", "g", 0.5),
        rollout("alone", None, 1.5),
        rollout("hole", "h", 9.0, incomplete="the disk was full"),
        rollout("failed", "h", 9.0, status="failed"),
        rollout("unjudged", "h", None),
    ]
    samples, account = samples_of([each.finished for each in recorded], config, judge=accepting(1.0))
    assert {each.rollout_id for each in samples} == {"alike0", "alike1", "good", "alone", "failed"}
    assert all((each.advantages == each.loss_mask).all() for each in samples)
    assert sum(float(each.weights.sum()) for each in samples) == pytest.approx(1.0)
    assert len({float(each.weights.max()) for each in samples}) == 1  # every token weighs the same
    assert account.adds_up and account.rollouts["rejected"] == 1
    with pytest.raises(NothingToLearn, match="rejected"):
        samples_of([each.finished for each in recorded[:4]], config, judge=accepting(3.0))


def test_the_loss_is_the_cross_entropy_of_what_was_sampled(config: TrainConfig) -> None:
    samples, _ = samples_of([each.finished for each in groups(2)], config, judge=accepting(1.0))
    model = AutoModelForCausalLM.from_pretrained(config.policy.model, dtype=torch.float64).eval()
    total = torch.zeros((), dtype=torch.float64)
    for each in samples:
        ids = torch.from_numpy(each.token_ids).long()
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        total = total - logprobs[torch.from_numpy(each.loss_mask[1:]) == 1].sum()
    expected = total.item() / sum(each.num_trained for each in samples)
    assert Learner(config).step(samples)["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_job_makes_accepted_answers_likelier(config: TrainConfig, tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "runs.duckdb", Path(config.policy.model))
    job = BatchJob(
        kind="sft",
        store=store,
        query="all",
        out=tmp_path / "run",
        config=config,
        min_reward=1.0,
        num_epochs=4,
        groups_per_step=3,
    )
    done: list[StepDone] = []
    summary = BatchRun(job).run(done.append)
    losses = [each.metrics["train/loss"] for each in done]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert summary.num_groups == 3 and done[0].metrics["rollouts/rejected"] == 6
    with pytest.raises(NothingToLearn):
        BatchRun(replace(job, out=tmp_path / "none", min_reward=2.0)).run()
