"""`polar-mitm rl` on an engine with a small model behind it: learning, faults, Ctrl-C; its input."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from safetensors.torch import load_file

from polar_mitm.conformance import byte_tokens
from tests.cli.conftest import ROOT, Polar, Result, finish, launch
from tests.trainer.tiny import tiny_model

pytestmark = pytest.mark.timeout(1200)
HARNESS = """
import json, ssl, sys, urllib.request as u
body = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": sys.argv[1]}]}
request = u.Request("https://api.anthropic.com/v1/messages", json.dumps(body).encode(),
                    {"content-type": "application/json", "x-api-key": "k"})
print(json.load(u.urlopen(request))["content"][0]["text"])
"""
TASKS = """
import itertools
from polar_mitm.tasks import Task

def tasks(split, seed):
    for n in itertools.count():
        yield Task(f"{split}-{seed}-{n}", "abcdefgh"[n % 8], reward=judge)

def judge(attempt):
    return attempt.stdout.strip() < ";", attempt.stdout
"""
TO_THE_WIRE = """
    SELECT r.step, r.trajectory_id, c.policy_version, w.response_body
    FROM run.step_rows r
    JOIN store.trajectories t ON t.trajectory_id = r.trajectory_id AND t.builder = 'forest'
    JOIN store.calls c ON list_contains([span.call_id for span in t.spans], c.call_id)
    JOIN store.wire w ON w.call_id = c.call_id
"""

LAG = "SELECT max(step - 1 - regexp_extract(policy_version, '\\d+')::INT) FROM run.step_rows"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many ids as the scripted engine's tokenizer has, and embeddings that are not tied."""
    return tiny_model(tmp_path_factory.mktemp("model"), vocabulary=byte_tokens.VOCAB_SIZE, tied=False, seed=3)


@contextmanager
def engine(model: Path, *options: object) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.support.learning_engine", str(model), *map(str, options)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


@pytest.fixture
def configured(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Writes a configuration; what is given replaces what is here."""

    def write(url: str, **tables: Any) -> Path:
        recipe, tasks = tmp_path / "asker.toml", tmp_path / "tasks.py"
        argv = json.dumps(["-c", HARNESS, "{prompt}"])
        recipe.write_text(f"[run]\nprogram = {json.dumps(sys.executable)}\nargv = {argv}\n")
        tasks.write_text(TASKS)
        config: dict[str, Any] = {
            "": {"out": str(tmp_path / "run"), "steps": 2, "name": "a test"},
            "engine": {"url": url},
            "policy": {"model": str(model)},
            "rollouts": {
                "harness": str(recipe),
                "tasks": str(tasks),
                "group_size": 4,
                "groups_per_step": 2,
                "concurrency": 4,
                "max_tokens": 1,
            },
            "optimiser": {"lr": 0.02},
        }
        for name, table in tables.items():
            config[name] = {**config.get(name, {}), **table}
        lines = []
        for name, table in config.items():
            lines += [f"[{name}]"] if name else []
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
        path = tmp_path / "rl.toml"
        path.write_text("\n".join(lines))
        return path

    return write


def query(out: Path, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect() as con:
        con.execute(f"ATTACH '{out / 'run.duckdb'}' AS run (READ_ONLY)")
        con.execute(f"ATTACH '{out / 'rollouts.duckdb'}' AS store (READ_ONLY)")
        return con.execute(sql).fetchall()


def versions(out: Path) -> list[str]:
    found = [each.name for each in (out / "checkpoints").iterdir()]
    return sorted(found, key=lambda name: int(name.removeprefix("step-")))


@pytest.mark.e2e
def test_it_learns(model: Path, configured: Callable[..., Path], tmp_path: Path) -> None:
    tables = {
        "": {"out": str(tmp_path / "run"), "steps": 6},
        "rollouts": {"group_size": 8},
        "optimiser": {"lr": 0.05},
        "evaluation": {"num_tasks": 8, "samples": 3},
    }
    with engine(model) as url:
        told = finish(launch("rl", configured(url, **tables), "--json"), timeout=1100)
    assert told.code == 0, told.err
    out, document = tmp_path / "run", told.json
    assert document["steps"] == 6 and document["policy_version"] == "step-6"
    assert document["after"]["reward"] > document["before"]["reward"]
    assert set(document["rewards"]) == set("123456") and set(document["evaluations"]) == {"0", "6"}
    assert {"run.duckdb", "rollouts.duckdb", "metrics.jsonl", "reward.png", "tensorboard", "worker.log"} <= {
        each.name for each in out.iterdir()
    }
    # The engine's logprobs are the learner's own, on tokens of the very weights that learn from them.
    mismatch = query(out, "SELECT max(value) FROM run.metrics WHERE name = 'train/mismatch_abs'")
    assert mismatch[0][0] < 1e-4 and query(out, LAG) == [(0,)]
    found, rows = query(out, TO_THE_WIRE), query(out, "SELECT count(*) FROM run.step_rows")
    assert len(found) == rows[0][0] > 0 and all(response for *_, response in found)
    trained = load_file(Path(document["checkpoint"]) / "model.safetensors")
    assert any(not trained[n].equal(each) for n, each in load_file(model / "model.safetensors").items())


@pytest.mark.e2e
def test_rollouts_that_go_on_are_not_too_stale(
    model: Path, configured: Callable[..., Path], tmp_path: Path
) -> None:
    tables = {"": {"out": str(tmp_path / "run"), "steps": 5}, "sync": {"mode": "async", "max_staleness": 1}}
    with engine(model) as url:
        told = finish(launch("rl", configured(url, **tables)), timeout=1100)
    assert told.code == 0, told.err
    out = tmp_path / "run"
    (lag,) = query(out, LAG)
    assert lag == (1,)  # some were begun under the weights before
    counted = query(
        out,
        "SELECT sum(value) FILTER (name = 'tokens/sampled') - sum(value) FILTER (name IN "
        "('tokens/trained', 'tokens/masked', 'tokens/left_out')) FROM run.metrics",
    )
    assert counted == [(0.0,)]


@pytest.mark.e2e
def test_one_run_in_a_folder_at_a_time(
    polar: Polar, model: Path, configured: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with engine(model) as url:
            told = polar("rl", configured(url))
    finally:
        os.close(other)
    assert told.code == 2 and "another polar-mitm rl works in" in told.err
    assert list(out.iterdir()) == []


def _whole(tmp_path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    return {"out": str(tmp_path / "run"), **fields}


@pytest.mark.e2e
def test_an_engine_that_refuses_an_update(
    model: Path, configured: Callable[..., Path], tmp_path: Path
) -> None:
    """What was learned is in a checkpoint, from which an engine that is well goes on."""
    with engine(model, "--refuse-after", 2) as url:  # the first two: what it starts with, and step 1
        path = configured(url, **{"": _whole(tmp_path, {"steps": 3})})
        told = finish(launch("rl", path), timeout=300)
    assert told.code == 3 and "the engine refused an update" in told.err and "out of memory" in told.err
    out = tmp_path / "run"
    assert versions(out) == ["step-2"]
    assert query(out, "SELECT status FROM run.runs") == [("failed",)]
    assert query(out, "SELECT step, policy_version FROM run.steps ORDER BY step") == [
        (1, "step-1"),
        (2, "step-2"),
    ]
    with engine(model) as url:
        path = configured(url, **{"": _whole(tmp_path, {"steps": 3})})
        told = finish(launch("rl", path, "--resume"), timeout=300)
    assert told.code == 0 and "going on after step 2, with step-2" in told.err, told.err
    assert query(out, "SELECT step, policy_version FROM run.steps ORDER BY step")[2:] == [(3, "step-3")]
    assert query(out, "SELECT status FROM run.runs") == [("done",)]


@pytest.mark.e2e
def test_ctrl_c_leaves_a_checkpoint(model: Path, configured: Callable[..., Path], tmp_path: Path) -> None:
    with engine(model) as url:
        path = configured(url, **{"": _whole(tmp_path, {"steps": 1000})})
        process = launch("rl", path, start_new_session=True)
        _until(tmp_path / "run" / "metrics.jsonl", '"step": 1')
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        told = finish(process, timeout=120)
    assert told.code == 130 and re.search(r"stopped at step \d+; --resume goes on", told.err), told.err
    out = tmp_path / "run"
    (last,) = query(out, "SELECT max(step) FROM run.steps")
    assert versions(out) == [f"step-{last[0]}"]
    assert query(out, "SELECT status FROM run.runs") == [("stopped",)]
    assert query(out, "SELECT count(*) FROM store.rollouts WHERE status = 'running'") == [(0,)]


@pytest.mark.e2e
def test_a_learner_that_is_killed(model: Path, configured: Callable[..., Path], tmp_path: Path) -> None:
    """The run ends with the end of its log; the last checkpoint is whole."""
    with engine(model) as url:
        path = configured(url, checkpoint={"every": 1}, **{"": _whole(tmp_path, {"steps": 1000})})
        process = launch("rl", path)
        _until(tmp_path / "run" / "checkpoints" / "step-1" / "trainer" / "state.json", "version")
        for child in _children(process.pid):
            if b"polar_mitm_trainer.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
        told = finish(process, timeout=120)
    assert told.code == 4 and "the learner's process ended (signal 9)" in told.err, told.err
    assert versions(tmp_path / "run")
    with engine(model) as url:
        path = configured(url, **{"": _whole(tmp_path, {"steps": 1})})
        told = finish(launch("rl", path, "--resume"), timeout=120)
    assert told.code == 0, told.err
    assert "from here on with other options: " in told.err and "steps: 1000, now 1" in told.err


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _until(path: Path, text: str) -> None:
    for _ in range(3000):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never held {text}")


# --- what is asked for wrongly --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"rollouts": {"group_size": 1}}, "a group of one has nothing to be compared with"),
        ({"rollouts": {"groupsize": 4}}, "there is no key rollouts.groupsize: there are tasks, harness"),
        ({"engine": {"model": "tiny"}}, "give either model, to have an engine started, or the url of one"),
        ({"loss": {"name": "ppo"}}, "loss.name: Input should be 'grpo'"),
        ({"loss": {"name": "sft"}}, "sft is for recorded rollouts"),
        ({"sync": {"every": 2}}, "on_policy means an update after each step"),
        ({"sync": {"mode": "async", "every": 4}}, "nothing that is fresh enough"),
        ({"loss": {"max_staleness": 2}}, "sync.max_staleness is what bounds it"),
        ({"rollouts.settings": {"nope": 1}}, "there is no setting 'nope' (rollouts.settings): there are"),
        ({"rollouts.settings": {"file": 1}}, "there is no setting 'file' (rollouts.settings): there are"),
    ],
)
def test_configurations_that_make_no_sense(
    polar: Polar, configured: Callable[..., Path], tables: dict[str, Any], message: str
) -> None:
    told = polar("rl", configured("http://127.0.0.1:1", **tables))
    assert told.code == 2 and message in " ".join(told.err.split()) and "Value error" not in told.err


def test_a_policy_that_is_no_table(polar: Polar, tmp_path: Path) -> None:
    path = tmp_path / "rl.toml"
    path.write_text('out = "run"\nsteps = 1\npolicy = "x"\nengine.model = "x"\nrollouts.tasks = "t.py"\n')
    told = polar("rl", path)
    assert told.code == 2 and "policy: Input should be" in told.err, told.err


def test_an_engine_that_is_not_there(polar: Polar, configured: Callable[..., Path], tmp_path: Path) -> None:
    """It is looked at before a policy is loaded."""
    told = polar("rl", configured("http://127.0.0.1:1"))
    assert told.code == 3 and "http://127.0.0.1:1" in told.err, told.err
    assert "loading the policy" not in told.err and not (tmp_path / "run").exists()


def test_files_that_are_none(polar: Polar, tmp_path: Path) -> None:
    told = polar("rl", tmp_path / "nothing.toml")
    assert told.code == 2 and "cannot be read" in told.err
    (tmp_path / "bad.toml").write_text("steps = ")
    told = polar("rl", tmp_path / "bad.toml")
    assert told.code == 2 and "is not TOML" in told.err


def test_no_run_to_resume_and_none_to_overwrite(
    polar: Polar, configured: Callable[..., Path], tmp_path: Path
) -> None:
    path = configured("http://127.0.0.1:1")
    told = polar("rl", path, "--resume")
    assert told.code == 2 and "holds no run" in told.err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.duckdb").touch()
    told = polar("rl", path)
    assert told.code == 2 and "holds a run already" in told.err


def test_no_torch(polar: Polar, configured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_mitm.cli.train.find_spec", lambda name: None)
    told: Result = polar("rl", configured("http://127.0.0.1:1"))
    assert told.code == 4 and "pip install 'polar-mitm[train]'" in told.err
