"""TRL's own GRPOTrainer on the same rollouts: from rewards to the gradient of every weight of a tiny model.

TRL calls a rollout function of ours, which gives it recorded rollouts with the logprobs of an engine that
disagrees a little; it scores them, makes advantages and corrections of its own, and after an update to the
weights its loss. Nothing of its formulas is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from polar_mitm_trainer.advantages import group_advantages
from polar_mitm_trainer.config import AdvantageConfig, LossConfig
from polar_mitm_trainer.logprobs import Head, token_logprobs
from polar_mitm_trainer.loss_defaults import resolve
from polar_mitm_trainer.losses import LOSSES
from polar_mitm_trainer.metrics import means
from polar_mitm_trainer.samples import Sample, weigh
from polar_mitm_trainer.token_batch import TokenBatch

VOCABULARY, MAX_LENGTH = 61, 16
REWARDS = [1.0, 0.0, None, 0.25, 0.0, 1.0, 1.0, 0.5]  # two groups of four


@dataclass
class Rollout:
    """Ids of a prompt and of what came after, of which some were sampled (`mask`) with these logprobs."""

    prompt: list[int]
    completion: list[int]
    mask: list[int]
    behaviour: list[float]


class Oracle:
    """TRL's trainer, set up once; `inputs` and `loss` are its own methods' results."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                tie_word_embeddings=True,
            )
        )
        for parameter in model.parameters():  # or all tokens would be alike
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / "model")
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model")  # so that TRL finds a reference
        self.old = self.weights()
        torch.manual_seed(5)
        self.new = {name: each + 0.05 * torch.randn_like(each) for name, each in self.old.items()}
        torch.manual_seed(6)
        self.reference = {name: each + 0.05 * torch.randn_like(each) for name, each in self.old.items()}
        self.rollouts = self.record()
        words = Tokenizer(WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0"))
        self.trl = GRPOTrainer(
            model=self.model,
            reward_funcs=lambda completions, **_: REWARDS,
            args=GRPOConfig(
                output_dir=str(folder),
                per_device_train_batch_size=len(REWARDS),
                num_generations=4,
                max_completion_length=MAX_LENGTH,
                beta=0.1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                use_bias_correction_kl=False,  # DeepSeek-V3.2's; ours is DeepSeekMath's
            ),
            train_dataset=Dataset.from_dict({"prompt": ["0"] * len(REWARDS)}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0"
            ),
            rollout_func=lambda prompts, trainer: {
                "prompt_ids": [each.prompt for each in self.rollouts],
                "completion_ids": [each.completion for each in self.rollouts],
                "logprobs": [each.behaviour for each in self.rollouts],
                "env_mask": [each.mask for each in self.rollouts],
            },
        )
        self.trl.current_gradient_accumulation_steps = 1
        self.trl._last_loaded_step = self.trl.state.global_step  # no engine has to be told of weights

    def weights(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.model.named_parameters()}

    def use(self, weights: dict[str, Tensor], model: Any = None) -> None:
        (model or self.model).load_state_dict(weights, strict=False)

    def logprobs(self, rollout: Rollout) -> Tensor:
        """Of the sampled tokens [M], as this project has them: hidden states, then chunks of logits."""
        ids = torch.tensor([rollout.prompt + rollout.completion])
        hidden = self.model.model(input_ids=ids).last_hidden_state[0]
        at = torch.tensor(rollout.mask).nonzero()[:, 0] + len(rollout.prompt)
        return token_logprobs(hidden[at - 1], ids[0, at], Head.of(self.model), chunk=4)[0]

    def record(self) -> list[Rollout]:
        """Ragged, with results of tools in between; the engine's logprobs are off by some tenths of a nat."""
        rng = np.random.default_rng(7)
        made = []
        for _ in REWARDS:
            prompt = rng.integers(2, VOCABULARY, rng.integers(1, 6)).tolist()
            length = int(rng.integers(2, MAX_LENGTH))
            mask = (rng.random(length) < 0.7).astype(int)
            mask[0] = 1
            rollout = Rollout(prompt, rng.integers(2, VOCABULARY, length).tolist(), mask.tolist(), [])
            behaviour = np.zeros(length)
            with torch.no_grad():
                behaviour[mask == 1] = self.logprobs(rollout).numpy() + rng.normal(0, 0.3, mask.sum())
            rollout.behaviour = behaviour.tolist()
            made.append(rollout)
        return made

    def loss(self, **settings: Any) -> tuple[float, dict[str, Tensor], dict[str, Any]]:
        """TRL's loss, its gradients, and what it made the loss of."""
        for name, value in settings.items():
            assert hasattr(self.trl, name)
            setattr(self.trl, name, value)
        self.trl.use_vllm = True  # or it corrects nothing; from here on it takes our rollouts for an engine's
        self.use(self.old)
        self.use(self.reference, self.trl.ref_model)
        self.model.train()
        inputs = self.trl._generate_and_score_completions([{"prompt": "0"}] * len(REWARDS))
        self.use(self.new)
        self.model.zero_grad()
        loss = self.trl._compute_loss(self.model, inputs)
        loss.backward()
        return loss.item(), self.gradients(), inputs

    def gradients(self) -> dict[str, Tensor]:
        return {name: each.grad.clone() for name, each in self.model.named_parameters()}

    def ours(self, config: LossConfig, advantage: AdvantageConfig) -> tuple[float, dict[str, Tensor], Any]:
        """From the same rollouts, by this project's code alone."""
        groups = [f"group-{number // 4}" for number in range(len(REWARDS))]
        advantages = group_advantages(REWARDS, groups, advantage)
        samples = weigh(
            [sample(each, number, advantages[number]) for number, each in enumerate(self.rollouts)],
            resolve(config).aggregation,
            constant=config.constant,
        )
        scored: dict[str, Sequence[Tensor]] = {}
        with torch.no_grad():
            for name, weights in ("old", self.old), ("reference", self.reference):
                self.use(weights)
                scored[name] = [self.logprobs(each) for each in self.rollouts]
        self.use(self.new)
        self.model.zero_grad()
        trained = lambda name: torch.cat(  # noqa: E731
            [torch.from_numpy(getattr(s, name)[s.loss_mask == 1]) for s in samples]
        )
        logprobs = [self.logprobs(each) for each in self.rollouts]
        tokens = TokenBatch(
            logprobs=torch.cat(logprobs),
            behaviour_logprobs=trained("behaviour_logprobs"),
            advantages=trained("advantages"),
            weights=trained("weights"),
            samples=torch.arange(len(samples)).repeat_interleave(torch.tensor([len(p) for p in logprobs])),
            num_samples=len(samples),
            old_logprobs=torch.cat(list(scored["old"])),
            reference_logprobs=torch.cat(list(scored["reference"])),
        )
        output = LOSSES[config.name](tokens, config)
        output.loss.backward()
        return output.loss.item(), self.gradients(), means(output.metrics)


def sample(rollout: Rollout, number: int, advantage: float) -> Sample:
    """TRL keeps a rollout without reward, with an advantage of nothing; so do we here, to compare."""
    mask = np.array([0] * len(rollout.prompt) + rollout.mask, dtype=np.uint8)
    behaviour = np.array([0.0] * len(rollout.prompt) + rollout.behaviour, dtype=np.float32)
    return Sample(
        trajectory_id=f"trajectory-{number}",
        rollout_id=f"rollout-{number}",
        group_id=f"group-{number // 4}",
        token_ids=np.array(rollout.prompt + rollout.completion, dtype=np.int32),
        loss_mask=mask,
        behaviour_logprobs=behaviour,
        advantages=(mask * np.nan_to_num(advantage)).astype(np.float32),
        weights=np.zeros(len(mask), dtype=np.float32),
    )


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("trl"))


PLAIN: dict[str, Any] = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "scale_rewards": "group",
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 1e30,  # no correction but the ratio
    "vllm_importance_sampling_clip_min": None,
}
UNBOUNDED = {"old_policy": "recomputed", "correction": "token_truncate", "correction_cap": 1e30}
SEQUENCE = {"importance_sampling_level": "sequence", "vllm_importance_sampling_mode": "sequence_truncate"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({}, {}),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"name": "dr_grpo", "constant": MAX_LENGTH},
    ),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"name": "dapo"}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.25}, {"name": "cispo", "clip_high": 0.25}),
    "gspo": (
        SEQUENCE | {"epsilon_low": 3e-4, "epsilon_high": 4e-4},
        {"name": "gspo", "correction": "sequence_truncate"},
    ),
    "gspo, wide": (
        SEQUENCE | {"epsilon_low": 0.05, "epsilon_high": 0.1},
        {"name": "gspo", "correction": "sequence_truncate", "clip_low": 0.05, "clip_high": 0.1},
    ),
    "kl": ({"beta": 0.3}, {"kl_coefficient": 0.3}),
}
for mode in "token_truncate", "token_mask", "sequence_truncate", "sequence_mask":
    CASES[mode] = (
        {
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.3,
            "vllm_importance_sampling_clip_min": 0.6,
        },
        {"correction": mode, "correction_cap": 1.3, "correction_floor": 0.6},
    )


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_trls(oracle: Oracle, name: str) -> None:
    theirs, ours = CASES[name]
    config = LossConfig(**(UNBOUNDED | ours))
    advantage = AdvantageConfig(std=theirs.get("scale_rewards") != "none")
    known, known_gradients, inputs = oracle.loss(**(PLAIN | theirs))
    found, gradients, metrics = oracle.ours(config, advantage)
    assert found == pytest.approx(known, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradients, known_gradients, rtol=1e-3, atol=1e-6)

    largest = max(each.abs().max().item() for each in gradients.values())
    assert largest > 1e-3, "there is something to learn"
    reported = oracle.trl._metrics["train"]
    assert metrics["mismatch_abs"] == pytest.approx(
        reported["sampling/sampling_logp_difference/mean"][-1], rel=1e-4
    )
    assert metrics["mismatch_abs_max"] == pytest.approx(
        reported["sampling/sampling_logp_difference/max"][-1], rel=1e-4
    )
    if name in ("grpo", "dapo"):
        assert metrics["clipped_low"] == pytest.approx(reported["clip_ratio/low_mean"][-1]) != 0
        assert metrics["clipped_high"] == pytest.approx(reported["clip_ratio/high_mean"][-1]) != 0
    if name == "kl":
        assert metrics["kl"] == pytest.approx(reported["kl"][-1], rel=1e-4)
    if config.correction_cap < 10:
        assert 0 < metrics["corrected"] < 1
    if name == "grpo":
        groups = [number // 4 for number in range(len(REWARDS))]
        advantages = group_advantages(REWARDS, [str(group) for group in groups], advantage)
        np.testing.assert_allclose(np.nan_to_num(advantages), inputs["advantages"], atol=1e-6)


def test_the_ratio_to_the_engine_itself_is_what_trl_makes_of_the_engines_logprobs(oracle: Oracle) -> None:
    """TRL has no such mode, but its loss takes any old policy's logprobs."""
    _, _, inputs = oracle.loss(**PLAIN)
    inputs["old_per_token_logps"] = inputs["sampling_per_token_logps"]
    inputs["importance_sampling_ratio"] = torch.ones(1)
    oracle.model.zero_grad()
    known = oracle.trl._compute_loss(oracle.model, inputs)
    known.backward()
    known_gradients = oracle.gradients()
    found, gradients, _ = oracle.ours(LossConfig(old_policy="behaviour"), AdvantageConfig())
    assert found == pytest.approx(known.item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradients, known_gradients, rtol=1e-3, atol=1e-6)
