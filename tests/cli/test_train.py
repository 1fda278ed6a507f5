"""`polar-mitm train` and `sft`: what people and machines are told, Ctrl-C, refusals, several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polar_mitm.store import open_reader
from tests.cli.conftest import POLAR_MITM, Polar, finish, launch
from tests.trainer.stores import groups, record, rollout
from tests.trainer.tiny import tiny_model, tiny_store

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def store(tmp_path: Path, model: Path) -> Path:
    """Without trajectories yet."""
    return tiny_store(tmp_path / "runs.duckdb", model, built=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text("[optimiser]\nlr = 0.01\n")
    return path


def test_from_a_capture_to_a_checkpoint(
    polar: Polar, store: Path, model: Path, config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["train", "-s", store, "-m", model, "-c", config, "--groups-per-step", 2, "--out"]
    told = polar(*command, out)
    assert told.code == 0, told.err
    assert "writing the trajectories of 12 rollouts" in told.err
    assert "step 2/2  reward 0.500" in told.err
    assert told.out.splitlines()[-1] == str(out / "checkpoints" / "step-2")
    with open_reader(store) as reader:
        assert reader.sql("FROM trajectories").num_rows > 12
    document = polar(*command, tmp_path / "again", "--json", "--loss", "dapo").json
    assert document["steps"] == 2 and document["metrics"]["train/num_updates"] == 1
    assert (document["num_groups"], document["stopped"]) == (3, False)
    again = polar(*command, out)
    assert again.code == 2 and "--resume goes on with it" in again.err
    more = polar(*command, out, "--resume", "--epochs", 2, "--json")
    assert more.code == 0 and more.json["steps"] == 4


def test_sft(polar: Polar, store: Path, model: Path, config: Path, tmp_path: Path) -> None:
    command = ["sft", "-s", store, "-m", model, "-c", config, "--out", tmp_path / "out", "--json"]
    told = polar(*command, "--min-reward", "0.5", "--steps", "1")
    assert told.code == 0, told.err
    assert told.json["metrics"]["rollouts/rejected"] == 6
    told = polar(*command[:-2], tmp_path / "none", "--min-reward", "7")
    assert told.code == 2 and "nothing to learn" in told.err and "12 rejected" in told.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "SELECT 1 AS trajectory_id WHERE false"], "selects no trajectory"),
        (["--query", "SELECT nothing"], "the query cannot be run"),
        (["--query", "few"], "no training set 'few'"),
        (["--resume"], "is no snapshot"),
        (["--loss", "ppo"], "loss.name: Input should be 'grpo'"),
        (["--loss", "dr_grpo"], "dr_grpo divides by a length; give one"),
        (["--loss", "sft"], "`polar-mitm sft`"),
    ],
)
def test_what_is_refused(
    polar: Polar, store: Path, model: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    told = polar("train", "-s", store, "-m", model, "--out", tmp_path / "out", *options)
    assert told.code == 2 and message in " ".join(told.err.split()), told.err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("loss = 'dapo'", "loss is a table: [loss], not loss = 'dapo'"),
        ("policy = 'x'", "policy is a table: [policy], not policy = 'x'"),
        ("[policy]\ndevice = 'potato'", "policy.device"),
        ("[optimiser]\nlr = inf", "optimiser.lr: Input should be"),
        ("[optimiser]\nlr = 1e30", "optimiser.lr: Input should be less than or equal to 1"),
        ("[optimiser]\nbetas = [0.9, 1.5]", "optimiser.betas.1: Input should be less than 1"),
        ("[loss]\nmax_staleness = 3", "loss.max_staleness: recorded rollouts"),
        ("[loss]\ncorrection_floor = 3.0", "correction_floor 3 is above correction_cap 2"),
        ("[loss]\noverlong_length = 5\noverlong_buffer = 6", "overlong_buffer 6 is above overlong_length 5"),
    ],
)
def test_a_configuration_that_makes_no_sense(polar: Polar, tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "odd.toml"
    file.write_text(lines)
    told = polar("train", "-s", tmp_path / "none", "-m", "m", "-o", tmp_path / "out", "-c", file)
    assert told.code == 2 and message in " ".join(told.err.split()), told.err


def test_what_cannot_enter_is_told_and_so_is_the_model(polar: Polar, model: Path, tmp_path: Path) -> None:
    holes = [rollout(f"holes{n}", "g0", 1.0, incomplete="a call is missing") for n in range(3)]
    bare = rollout("bare", "g0", 1.0, num_calls=1, first={"behaviour_logprobs": []})
    store = tiny_store(tmp_path / "holes.duckdb", model, [*groups(1), *holes, bare])
    command = ["train", "-s", store, "-m", model, "--out"]
    told = polar(*command, tmp_path / "out")
    assert told.code == 0, told.err
    words = " ".join(told.err.split())
    assert "left out: 2 sampled tokens no_logprobs, 3 incomplete_rollout (first: a call is miss" in words
    assert " of 'tiny', snapshot " in " ".join(told.out.split())
    told = polar(*command, tmp_path / "other", "--served-as", "large")
    assert told.code == 2 and "6 of another model ('tiny', the policy is 'large')" in " ".join(
        told.err.split()
    )
    assert polar(*command, tmp_path / "same", "--served-as", "tiny", "--json").json["model"] == "tiny"
    told = polar(*command, tmp_path / "out", "--resume", "--served-as", "large")
    assert told.code == 2 and "what 'tiny' sampled" in " ".join(told.err.split())


def test_named_sets_and_a_column_reward_beside_several_verdicts(
    polar: Polar, model: Path, tmp_path: Path
) -> None:
    recorded = groups(1)
    for at, one in enumerate(recorded):
        one.rewards = {"reward": 0.0, "style": float(at)}
    store = tiny_store(tmp_path / "several.duckdb", model, recorded)
    sets = tmp_path / "sets.toml"
    sets.write_text(
        'styled = """SELECT trajectory_id, value AS reward FROM trajectories JOIN rewards USING (rollout_id) '
        "WHERE builder = 'forest' AND name = 'style'\"\"\"\n"
    )
    command = ["train", "-s", store, "-m", model, "--query", "styled", "--json", "--out", tmp_path / "out"]
    assert "no training set 'styled'" in polar(*command).json["error"]
    told = polar(*command, "--sets", sets)
    assert told.code == 0 and told.json["metrics"]["reward/mean"] == 1.5, told.err


def test_no_model_and_none_like_it(polar: Polar, store: Path, tmp_path: Path) -> None:
    command = ["train", "-s", store, "--out", tmp_path / "out"]
    assert "say what to train" in polar(*command).err
    told = polar(*command, "-m", tmp_path / "nothing")
    assert told.code == 4 and "nothing" in told.err


def test_each_is_told_as_what_it_is(polar: Polar, store: Path, model: Path, tmp_path: Path) -> None:
    command = ["train", "-s", store, "-o", tmp_path / "out"]
    short, kl = tmp_path / "short.toml", tmp_path / "kl.toml"
    short.write_text("[packing]\nmax_tokens = 3\n")
    kl.write_text("reference = 'nowhere'\n[loss]\nkl_coefficient = 0.1\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for options, code, message in (
        (["-m", model, "-c", short], 2, "raise packing.max_tokens"),
        (["-m", model, "-c", kl], 4, "the reference of the KL term: nowhere cannot be loaded"),
        (["-m", tmp_path / "adapter"], 4, "is an adapter: train on from its merged export"),
    ):
        told = polar(*command[:-1], tmp_path / f"out-{code}-{len(message)}", *options, "--json")
        assert told.code == code and message in told.json["error"], told.json


def test_another_tokenizer(polar: Polar, model: Path, tmp_path: Path) -> None:
    store = record(tmp_path / "other.duckdb", groups())
    told = polar("train", "-s", store, "-m", model, "--out", tmp_path / "out")
    assert told.code == 2 and "cannot be trained on" in told.err and "tokenizer" in told.err


def test_no_torch(polar: Polar, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_mitm.cli.train.find_spec", lambda name: None)
    told = polar("train", "-s", store, "-m", "m", "--out", "o", "--json")
    assert told.code == 4 and "pip install 'polar-mitm[train]'" in told.json["error"]


def test_ctrl_c_and_resume_give_the_same_weights(
    polar: Polar, store: Path, model: Path, config: Path, tmp_path: Path
) -> None:
    command = ["train", "-s", store, "-m", model, "-c", config, "--groups-per-step", 1, "--out"]
    process = launch(*command, tmp_path / "out", "--epochs", 10_000)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    told = finish(process)
    assert told.code == 130 and "stopping after this step" in told.err
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == done
    total = ["--steps", done + 2, "--json"]
    resumed = polar(*command, tmp_path / "out", "--resume", *total).json
    straight = polar(*command, tmp_path / "straight", *total).json
    assert resumed["steps"] == straight["steps"] == done + 2
    ours, theirs = (load_file(Path(d["checkpoint"]) / "model.safetensors") for d in (resumed, straight))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_on_two_ranks(store: Path, model: Path, config: Path, tmp_path: Path, polar: Polar) -> None:
    options = ["train", "-s", store, "-m", model, "-c", config, "--groups-per-step", 3, "--json", "--out"]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", POLAR_MITM]
    done = subprocess.run(
        list(map(str, [sys.executable, *many, *options, tmp_path / "two"])),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one document: the first rank's
    one = polar(*options, tmp_path / "one").json
    assert two["steps"] == one["steps"] == 1
    for name in ("train/loss", "train/grad_norm"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4, abs=1e-6)
    ours, theirs = (load_file(Path(d["checkpoint"]) / "model.safetensors") for d in (two, one))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
