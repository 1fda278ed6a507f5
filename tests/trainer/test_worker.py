"""The learner in another process: the same as in this one; its refusals, its death, its strangers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from polar_mitm.errors import SetupError
from polar_mitm_trainer.config import TrainConfig
from polar_mitm_trainer.fanout import samples_of
from polar_mitm_trainer.learner import Learner
from polar_mitm_trainer.samples import Sample
from polar_mitm_trainer.worker import Refused, Worker, WorkerLost
from tests.trainer.stores import groups
from tests.trainer.tiny import tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    torch.set_num_threads(2)
    model = tiny_model(tmp_path_factory.mktemp("model"))
    return TrainConfig.model_validate({"policy": {"model": str(model)}, "optimiser": {"lr": 0.01}})


@pytest.fixture(scope="module")
def samples(config: TrainConfig) -> list[Sample]:
    found, _ = samples_of([each.finished for each in groups(1)], config)
    return found


@pytest.fixture
def worker(config: TrainConfig, tmp_path: Path) -> Iterator[Worker]:
    with Worker(config, tmp_path / "worker.log") as worker:
        yield worker


def test_as_in_this_process(
    worker: Worker, config: TrainConfig, samples: list[Sample], tmp_path: Path
) -> None:
    learner = Learner(config)
    for _ in range(2):
        assert worker.step(samples) == pytest.approx(learner.step(samples), rel=1e-6)
    ours, theirs = learner.logprobs(samples), worker.logprobs(samples)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    assert worker.version() == 2

    for step in (1, 2):
        worker.save(tmp_path / f"checkpoints/step-{step}", {"groups": 8 * step}, keep_last=1)
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    worker.step(samples)
    assert worker.resume(tmp_path / "checkpoints") == {"groups": 16} and worker.version() == 2
    assert worker.resume(tmp_path) is None

    worker.export(tmp_path / "exported")
    assert (tmp_path / "exported/model.safetensors").exists()


def test_on_two_ranks(config: TrainConfig, samples: list[Sample], tmp_path: Path) -> None:
    with Worker(config, tmp_path / "worker.log", num_processes=2) as two:
        metrics = two.step(samples)
        two.save(tmp_path / "checkpoints/step-1", {"groups": 1}, keep_last=1)
        assert two.resume(tmp_path / "checkpoints") == {"groups": 1} and two.version() == 1
        with pytest.raises(Refused):
            two.step([])
        scores = two.logprobs(samples)
    learner = Learner(config)
    expected = learner.step(samples)
    for name in ("loss", "grad_norm", "entropy"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(scores, learner.logprobs(samples), strict=True))


def test_what_it_refuses_it_survives(worker: Worker, samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no sample has a token that trains"):
        worker.step([])
    with pytest.raises(Refused, match="no adapters"):
        worker.export(tmp_path / "adapter", adapter=True)
    assert worker.version() == 0 and worker.step(samples)


def test_its_death_is_told_with_the_end_of_its_log(worker: Worker, tmp_path: Path) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match=r"ended \(signal 9\); .*worker\.log ends with:"):
        worker.version()
    with pytest.raises(WorkerLost):
        worker.version()


def test_killed_in_the_middle_of_a_step(worker: Worker, samples: list[Sample]) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (worker.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(WorkerLost):
        worker.step(samples)
    killer.join()


def test_no_such_model(tmp_path: Path) -> None:
    config = TrainConfig.model_validate({"policy": {"model": str(tmp_path / "nothing")}})
    with pytest.raises(SetupError, match="nothing"):
        Worker(config, tmp_path / "worker.log")


def test_below_a_long_temporary_folder(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket's path has room for 107 bytes."""
    far = tmp_path / ("far" * 40)
    far.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(far))
    with Worker(config, tmp_path / "worker.log") as worker:
        assert worker.version() == 0


def test_strangers_do_not_get_in(config: TrainConfig, tmp_path: Path) -> None:
    """Its folder is this user's alone."""
    with Worker(config, tmp_path / "worker.log") as worker:
        folder = Path(worker._folder.name)
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


def test_it_ends_with_whoever_started_it(config: TrainConfig, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from polar_mitm_trainer.config import TrainConfig\n"
        "from polar_mitm_trainer.worker import Worker\n"
        f"config = TrainConfig.model_validate_json({config.model_dump_json()!r})\n"
        f"worker = Worker(config, Path({str(tmp_path / 'worker.log')!r}))\n"
        "print(worker.pid, 'torch' in sys.modules, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid, torch_is_here = done.stdout.split()
    assert torch_is_here == "False"
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        threading.Event().wait(0.1)
    pytest.fail("the worker is still there")
