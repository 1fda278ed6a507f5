"""The learner and a real vLLM on the same weights: what was sampled scores alike, to float32 rounding."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from polar_mitm import engine
from polar_mitm_trainer.learner import Learner
from polar_mitm_trainer.samples import Sample, weigh
from tests.trainer.policies import config_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
PROMPTS = [
    "List the files here, then say which of them is the largest.",
    "Write a function that sorts a list of words by their length. " * 20,
]


@pytest.fixture(scope="module")
def vllm() -> Iterator[engine.EngineState]:
    """The managed engine with the default model, which it serves in float32; started here unless it runs."""
    running = engine.status()
    state = running or engine.up(on_step=lambda step: print(step, file=sys.stderr))
    yield state
    if running is None:
        engine.down()


def sampled(vllm: engine.EngineState, prompt: list[int], group: int, num: int) -> list[Sample]:
    """One prompt's samples; each rollout is one call."""
    body = {
        "model": vllm.served_model_name,
        "prompt": prompt,
        "n": num,
        "max_tokens": 100,
        "temperature": 1.0,
        "logprobs": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{vllm.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as response:
        choices = json.load(response)["choices"]
    made = []
    for choice in choices:
        own = choice["token_ids"]
        mask = np.r_[np.zeros(len(prompt)), np.ones(len(own))].astype(np.uint8)
        logprobs = np.r_[np.zeros(len(prompt)), choice["logprobs"]["token_logprobs"]].astype(np.float32)
        name = f"{group}-{choice['index']}"
        advantages = mask * np.float32(1 if choice["index"] % 2 else -1)
        ids = np.array([*prompt, *own], dtype=np.int32)
        made.append(Sample(name, name, str(group), ids, mask, logprobs, advantages, advantages))
    return made


def test_what_the_engine_sampled_the_learner_scores_alike(vllm: engine.EngineState) -> None:
    """Behind two prompts, four times each, so that the learner's branches share as the engine's do."""
    model = engine.ensure_model(engine.default_cache(), None, lambda step: None)
    assert vllm.dtype == "float32"
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = []
    for group, text in enumerate(PROMPTS):
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        samples += sampled(vllm, prompt, group, 4)
    torch.set_num_threads(1)  # the engine has the cores
    learner = Learner(config_for(model, optimiser={"lr": 1e-5}))
    scores = learner.logprobs(samples)
    engines, ours = (
        np.concatenate([each[sample.loss_mask == 1] for each, sample in zip(side, samples, strict=True)])
        for side in ([sample.behaviour_logprobs for sample in samples], scores)
    )
    assert engines.size > 200 and engines.std() > 0.5, "there was something to agree on"
    difference = np.abs(ours - engines)
    print(f"{engines.size} tokens: mean {difference.mean():.2g}, max {difference.max():.2g} nats")
    assert difference.max() < 1e-4 and difference.mean() < 1e-5
    found = learner.step(weigh(samples, "token"))
    assert found["mismatch_abs_max"] == pytest.approx(difference.max(), abs=1e-6)
    assert found["sharing"] > 2
