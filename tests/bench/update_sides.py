"""One side of a training benchmark in a process of its own: this trainer's update, or TRL's.

    python -m tests.bench.update_sides SPEC.json

makes the updates of a `tests.bench.updates.Spec` and prints one JSON object: seconds of the clock and of
the processor, of the fastest update after the first; the peak of resident memory above what was resident
before the first one (the model, but neither gradients nor the optimiser's state); loss and gradient norm
of the first, by which sides are compared. Both are given the same weights, samples, loss and optimiser.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.learner import Learner
from polar_mitm_trainer.samples import Sample, weigh
from tests.bench.updates import Spec, load


class Meter:
    """Times of steps, and memory."""

    def __init__(self) -> None:
        self._resident = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
        self._laps: list[tuple[float, float]] = []

    def begin(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self._laps.append((time.perf_counter() - self._began[0], time.process_time() - self._began[1]))

    def result(self, loss: float, grad_norm: float) -> dict[str, float]:
        wall, cpu = (min(each) for each in zip(*(self._laps[1:] or self._laps), strict=True))
        peak = _memory("VmHWM") - self._resident
        return {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak, "loss": loss, "grad_norm": grad_norm}


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def ours(spec: Spec, samples: list[Sample]) -> dict[str, float]:
    """`Learner.step`, metrics and all."""
    config = TrainConfig.model_validate(
        {
            "policy": {"model": spec.model, "device": "cpu", "gradient_checkpointing": spec.checkpointing},
            "optimiser": {"lr": 1e-6},
            "loss": {"name": spec.loss},
            "packing": {"max_tokens": spec.max_tokens, "tree": spec.tree},
        }
    )
    learner = Learner(config)
    meter = Meter()
    metrics = []
    for _ in range(spec.steps):
        meter.begin()
        metrics.append(learner.step(weigh(samples, "token" if spec.loss == "dapo" else "sequence")))
        meter.end()
    return meter.result(metrics[0]["loss"], metrics[0]["grad_norm"])


def trl(spec: Spec, samples: list[Sample]) -> dict[str, float]:
    """`GRPOTrainer.train`, given these samples where it would generate; they fill one optimiser step."""
    logged: list[dict[str, float]] = []

    def padded(arrays: list[np.ndarray], side: str = "right") -> Tensor:
        return pad_sequence([torch.from_numpy(each) for each in arrays], batch_first=True, padding_side=side)

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            def rest(name: str, dtype: type) -> list[np.ndarray]:
                return [getattr(each, name)[spec.prompt :].astype(dtype) for each in samples]

            prompts = [each.token_ids[: spec.prompt].astype(np.int64) for each in samples]
            ids, masks = rest("token_ids", np.int64), rest("loss_mask", np.int64)
            return {
                "prompt_ids": padded(prompts, "left"),
                "prompt_mask": padded([np.ones_like(each) for each in prompts], "left"),
                "completion_ids": padded(ids),
                "completion_mask": padded([np.ones_like(each) for each in ids]),
                "tool_mask": padded(masks),
                "old_per_token_logps": padded(rest("behaviour_logprobs", np.float32)),
                "advantages": torch.tensor([each.advantages[each.loss_mask == 1][0] for each in samples]),
                "num_items_in_batch": torch.tensor(sum(each.num_trained for each in samples)),
            }

    class Laps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            logged.append(logs)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            per_device_train_batch_size=spec.batch,
            gradient_accumulation_steps=len(samples) // spec.batch,
            num_generations=len(samples),
            max_steps=spec.steps,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            max_grad_norm=1.0,
            loss_type=spec.loss,
            epsilon=0.2,
            epsilon_high=0.28 if spec.loss == "dapo" else 0.2,
            gradient_checkpointing=spec.checkpointing,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = Trainer(
            AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["w1"] * len(samples)}),
            processing_class=AutoTokenizer.from_pretrained(spec.model),
            callbacks=[Laps()],
        )
        meter = Meter()
        trainer.train()
    return meter.result(logged[0]["loss"], logged[0]["grad_norm"])


def main(path: str) -> None:
    """Print what one side measured."""
    spec = Spec(**json.loads(Path(path).read_text()))
    torch.set_num_threads(spec.threads)
    print(json.dumps((ours if spec.side == "ours" else trl)(spec, load(spec.samples))))


if __name__ == "__main__":
    main(*sys.argv[1:])
