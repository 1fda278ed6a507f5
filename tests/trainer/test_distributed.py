"""Two processes over gloo, started by torchrun, against one: the same steps, and each other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.distributed import Distributed
from polar_mitm_trainer.learner import BadStepError, Learner
from tests.trainer.policies import config_for, policy_folder, samples_for
from tests.trainer.test_learner import with_value

pytestmark = pytest.mark.timeout(600)  # starts processes that import torch
KINDS: dict[str, dict[str, Any]] = {
    "full": {"loss": {"kl_coefficient": 0.1, "old_policy": "recomputed"}},
    "lora": {"policy": {"lora": {"rank": 4}}, "loss": {"kl_coefficient": 0.1}},
    "bfloat16": {"policy": {"dtype": "bfloat16", "gradient_checkpointing": True}},
}


def settings(model: Path, kind: str) -> TrainConfig:
    """Three micro-batches, so that one of two ranks has nothing to do at the end."""
    optimiser = {"epochs": 2, "eps": 1e-2}  # near zero, AdamW makes as much of rounding as of a gradient
    return config_for(model, optimiser=optimiser, packing={"max_tokens": 200}, **KINDS[kind])


def steps(learner: Learner, model: Path, out: Path) -> dict[str, Any]:
    """What a run does, and what it tells."""
    samples = samples_for(model)
    bad = with_value(samples[2], "advantages", float("nan"))
    refused = ""
    try:
        learner.step([*samples[:2], bad, *samples[3:]])
    except BadStepError as error:
        refused = str(error)
    told = [learner.step(samples)]
    learner.save(out / "step-1", {"seed": 1})
    learner.export(out / "export")
    assert learner.resume(out / "step-1") == {"seed": 1}
    told.append(learner.step(samples_for(model, seed=1)))
    learner.save(out / "step-2")
    return {
        "steps": told,
        "refused": refused,
        "logprobs": [each.tolist() for each in learner.logprobs(samples)],
        "version": learner.version,
    }


def main(model: Path, out: Path) -> None:
    """One of the two."""
    torch.set_num_threads(1)
    distributed = Distributed.from_environment("cpu")
    for kind in KINDS:
        found = steps(Learner(settings(model, kind), distributed=distributed), model, out / kind)
        (out / f"{kind}-{distributed.rank}.json").write_text(json.dumps(found))
    distributed.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # tiny tensors
    return policy_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    out, root = tmp_path_factory.mktemp("two"), Path(__file__).parents[2]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", __name__, model, out]
    subprocess.run(
        [sys.executable, "-m", *command], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does(two: Path, model: Path, tmp_path: Path, kind: str) -> None:
    first, second = (json.loads((two / f"{kind}-{rank}.json").read_text()) for rank in range(2))
    assert first == second, "metrics are those of all ranks"
    expected = steps(Learner(settings(model, kind)), model, tmp_path)
    rounding = 1e-2 if kind == "bfloat16" else 1e-5
    assert first["version"] == expected["version"] == 2
    assert first["refused"] == expected["refused"] == (
        "the step was refused: NaN or infinity in advantages; trajectories t2"
    )  # fmt: skip
    for found, known in zip(first["steps"], expected["steps"], strict=True):
        assert known["num_micro_batches"] == 3
        assert found == pytest.approx(known, rel=rounding, abs=rounding / 10)
    for found, known in zip(first["logprobs"], expected["logprobs"], strict=True):
        assert found == pytest.approx(known, abs=10 * rounding)
    for folder in ("export", "step-1", "step-2"):
        for path in (tmp_path / folder).glob("**/*.safetensors"):
            stored = load_file(two / kind / path.relative_to(tmp_path))
            for name, tensor in load_file(path).items():
                torch.testing.assert_close(stored[name], tensor, atol=rounding, rtol=rounding, msg=name)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_process_goes_on_from_a_checkpoint_of_two(two: Path, model: Path, kind: str) -> None:
    told = json.loads((two / f"{kind}-0.json").read_text())
    learner = Learner(settings(model, kind))
    position = learner.resume(two / kind / "step-1")
    found = learner.step(samples_for(model, seed=position["seed"]))
    assert found == pytest.approx(told["steps"][1], rel=1e-5, abs=1e-6)


def test_without_torchrun_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    alone = Distributed.from_environment()
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.gather("x") == ["x"] and alone.spread([1, 2, 3]) == [1, 2, 3]


def test_every_rank_gets_as_many_turns() -> None:
    ranks = [Distributed(rank, 3).spread([*"abcd"]) for rank in range(3)]
    assert ranks == [["a", "d"], ["b", None], ["c", None]]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
