"""Saved, and gone on from in another process, to the bit; what is torn or somebody else's is passed over."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3Config

from polar_mitm_trainer.checkpoint import CheckpointError, latest, prune, written
from polar_mitm_trainer.learner import Learner
from polar_mitm_trainer.samples import Sample
from tests.trainer.policies import (
    SHAPE,
    config_for,
    plain,
    plain_logprobs,
    policy_folder,
    same,
    samples_for,
    weights,
)

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"policy": {"lora": {"rank": 4}}},
    "bfloat16": {"policy": {"dtype": "bfloat16"}},
}
SETTINGS: dict[str, Any] = {"optimiser": {"warmup_steps": 3, "epochs": 2, "updates_per_step": 2}}
GO_ON = """
import json, random, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from polar_mitm_trainer.learner import Learner
from tests.trainer.policies import samples_for, weights
from tests.trainer.test_checkpoint import KINDS, settings

torch.set_num_threads(1)
base, out = Path(sys.argv[1]), Path(sys.argv[2])
for kind in KINDS:
    learner = Learner(settings(base, kind))
    position = learner.resume(out / kind / "checkpoints" / "step-2")
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    found = [learner.step(samples_for(base, seed=seed)) for seed in position["seeds"]]
    save_file(weights(learner), out / kind / "resumed.safetensors")
    (out / kind / "resumed.json").write_text(json.dumps([found, drawn, learner.version]))
"""


def settings(base: Path, kind: str) -> Any:
    return config_for(base, **{**SETTINGS, **KINDS[kind]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # tiny tensors
    return policy_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def samples(model: Path) -> list[Sample]:
    return samples_for(model)


@pytest.fixture
def checkpoints(model: Path, samples: list[Sample], tmp_path: Path) -> Path:
    """Of steps 1, 2 and 10."""
    learner = Learner(config_for(model))
    for version in (1, 2, 10):
        learner.step(samples)
        learner.version = version
        learner.save(tmp_path / "checkpoints" / learner.policy_version, {"at": version})
    return tmp_path / "checkpoints"


@pytest.mark.timeout(600)  # starts a process that imports torch
def test_a_resumed_run_ends_where_the_straight_one_does(model: Path, tmp_path: Path) -> None:
    """In a new process: weights, metrics, what generators draw, and where the data went on."""
    expected = {}
    for kind in KINDS:
        learner = Learner(settings(model, kind))
        for seed in (1, 2):
            learner.step(samples_for(model, seed=seed))
        learner.save(tmp_path / kind / "checkpoints" / "step-2", {"seeds": [3, 4]})
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        found = [learner.step(samples_for(model, seed=seed)) for seed in (3, 4)]
        expected[kind] = (weights(learner), [found, drawn, 4])
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", GO_ON, model, tmp_path],
        check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    for kind, (straight, told) in expected.items():
        assert json.loads((tmp_path / kind / "resumed.json").read_text()) == told, kind
        assert same(load_file(tmp_path / kind / "resumed.safetensors"), straight), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_a_folder_as_transformers_or_peft_load_it(
    model: Path, samples: list[Sample], tmp_path: Path, kind: str
) -> None:
    learner = Learner(settings(model, kind))
    learner.step(samples)
    learner.save(tmp_path / "step-1")
    if kind == "lora":
        loaded: Any = PeftModel.from_pretrained(plain(model), tmp_path / "step-1").eval()
        stored = load_file(tmp_path / "step-1" / "adapter_model.safetensors")
    else:
        loaded = plain(tmp_path / "step-1")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight, "tied, as it was"
        stored = load_file(tmp_path / "step-1" / "model.safetensors")
    assert {each.dtype for each in stored.values()} == {torch.float32}
    for sample, found in zip(samples[:3], learner.logprobs(samples[:3]), strict=True):
        expected = plain_logprobs(loaded, sample.token_ids).detach().numpy() * sample.loss_mask
        np.testing.assert_allclose(found, expected, atol=0.1 if kind == "bfloat16" else 3e-5)


def test_the_latest_is_the_one_with_the_highest_number(checkpoints: Path, tmp_path: Path) -> None:
    (checkpoints / ".step-11.new-1").mkdir()
    (checkpoints / "step-12x").mkdir()
    assert latest(checkpoints) == checkpoints / "step-10"
    assert latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors has 100 bytes of"),
        ("trainer/optimiser.safetensors", "trainer/optimiser.safetensors has 100 bytes of"),
        ("trainer/state.json", "trainer/state.json cannot be read"),
    ],
)
def test_a_torn_checkpoint_is_passed_over(
    checkpoints: Path, model: Path, caplog: pytest.LogCaptureFixture, name: str, message: str
) -> None:
    os.truncate(checkpoints / "step-10" / name, 100)
    with caplog.at_level(logging.WARNING):
        assert latest(checkpoints) == checkpoints / "step-2"
    assert message in caplog.text and "step-10 is no whole checkpoint" in caplog.text
    (checkpoints / "step-2" / name).unlink()
    assert latest(checkpoints) == checkpoints / "step-1"
    learner = Learner(config_for(model))
    before = weights(learner)
    for torn in ("step-10", "step-2"):
        with pytest.raises(CheckpointError, match=f"{torn} is no"):
            learner.resume(checkpoints / torn)
    assert same(weights(learner), before) and learner.version == 0
    assert learner.resume(checkpoints / "step-1") == {"at": 1}


def test_old_ones_are_removed(checkpoints: Path) -> None:
    prune(checkpoints, keep_last=2)
    assert sorted(each.name for each in checkpoints.iterdir()) == ["step-10", "step-2"]
    prune(checkpoints, keep_last=0)
    assert [each.name for each in checkpoints.iterdir()] == ["step-10"]


def test_another_policys_checkpoint_is_refused(
    checkpoints: Path, model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    wider = Qwen3Config(**{**SHAPE, "hidden_size": 40}, tie_word_embeddings=True)
    others = {
        "was trained with lora None, not .*'rank': 4": config_for(model, policy={"lora": {"rank": 4}}),
        r"no weights for model.embed_tokens.weight in shape \[97, 40\]": config_for(
            policy_folder(tmp_path / "wider", wider)
        ),
    }
    for message, config in others.items():
        learner = Learner(config)
        before = weights(learner)
        with pytest.raises(CheckpointError, match=message):
            learner.resume(checkpoints / "step-2")
        assert same(weights(learner), before) and learner.version == 0


def test_what_is_written_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    for text in ("first", "second"):
        with written(folder) as new:
            (new / "deep").mkdir()
            (new / "deep" / "file").write_text(text)
            assert new.parent == tmp_path and folder.exists() == (text == "second")
        assert (folder / "deep" / "file").read_text() == text
    with pytest.raises(KeyboardInterrupt), written(folder) as new:
        (new / "file").write_text("third")
        raise KeyboardInterrupt
    assert (folder / "deep" / "file").read_text() == "second"
    assert [each.name for each in tmp_path.iterdir()] == ["step-1"]
