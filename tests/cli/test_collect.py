"""`polar-mitm collect`: what it tells, what it refuses, and how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from polar_mitm.store import Recorder, open_reader
from tests.cli.conftest import Polar
from tests.cli.test_run import ASK

TASKS = f"""
from polar_mitm.tasks import Task

def tasks(split, seed):
    for n in range(3):
        yield Task(f"{{split}}-{{seed}}-{{n}}", {ASK!r} + f"print({{n}})", reward=judge)

def judge(attempt):
    return float(attempt.stdout.split()[-1]) / 2, "by the last word"

def unjudgeable(split, seed):
    for task in tasks(split, seed):
        yield Task(task.task_id, task.prompt, reward=["false"])

def late(split, seed):
    yield from tasks(split, seed)
    raise OSError("the disk is gone")
"""


@pytest.fixture
def collect(tmp_path: Path, engine_url: str) -> list[str]:
    recipe = tmp_path / "python.toml"
    recipe.write_text(f'[run]\nprogram = {json.dumps(sys.executable)}\nargv = ["-c", "{{prompt}}"]\n')
    (tmp_path / "tasks.py").write_text(TASKS)
    store = tmp_path / "new.duckdb"
    return ["collect", "--store", str(store), "--engine", engine_url, "--harness", str(recipe), "--tasks"]


def test_what_a_person_is_told(polar: Polar, collect: list[str], tmp_path: Path) -> None:
    told = polar(*collect, tmp_path / "tasks.py", "--group-size", "2")
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    assert lines[0].split() == ["task", "rollouts", "reward", "statuses"]
    assert sorted(line.split() for line in lines[1:4]) == [
        [f"train-0-{n}", "2", reward, "2", "completed"]
        for n, reward in enumerate(("0.000", "0.500", "1.000"))
    ]
    assert lines[4].startswith("3 tasks, 6 rollouts in ")
    assert "(6 completed): mean reward 0.500 of 6, 6 calls, " in lines[4]
    assert str(tmp_path / "new.duckdb") in told.err


def test_what_a_machine_is_told(polar: Polar, collect: list[str], tmp_path: Path) -> None:
    options = ["--num-tasks", "2", "--group-size", "2", "--split", "test", "--seed", "7", "--json"]
    told = polar(*collect, f"{tmp_path}/tasks.py:tasks", *options)
    assert told.code == 0, told.err
    assert (told.json["tasks"], told.json["rollouts"], told.json["with_reward"]) == (2, 4, 4)
    assert (told.json["mean_reward"], told.json["groups_of_unequal_rewards"]) == (0.25, 0)
    assert told.json["statuses"] == {"completed": 4} and told.json["no_reward"] == {}
    by_task = {group["task_id"]: group for group in told.json["groups"]}
    assert {name: group["rewards"] for name, group in by_task.items()} == {
        "test-7-0": [0.0, 0.0],
        "test-7-1": [0.5, 0.5],
    }
    with open_reader(tmp_path / "new.duckdb") as reader:
        rewards = {reward.rollout_id: reward.value for reward in reader.rewards()}
        groups = {rollout.rollout_id: rollout.group_id for rollout in reader.rollouts()}
    assert len(rewards) == 4
    for group in told.json["groups"]:
        assert [rewards[each] for each in group["rollout_ids"]] == group["rewards"]
        assert {groups[each] for each in group["rollout_ids"]} == {group["group_id"]}


def test_rewards_that_fail_are_counted(polar: Polar, collect: list[str], tmp_path: Path) -> None:
    source = f"{tmp_path}/tasks.py:unjudgeable"
    told = polar(*collect, source, "--num-tasks", "2")
    assert told.code == 0
    assert "mean reward - of 0" in told.out
    assert "2 rollouts without a reward: the reward command ended with 1" in told.err


def test_nothing_that_starts(polar: Polar, collect: list[str], tmp_path: Path) -> None:
    Path(collect[collect.index("--harness") + 1]).write_text('[run]\nprogram = "no-such-program"\n')
    told = polar(*collect, tmp_path / "tasks.py", "--json")
    assert told.code == 4
    assert told.json["kind"] == "setup" and "no-such-program" in told.json["error"]


def test_a_source_that_fails_on_the_way(polar: Polar, collect: list[str], tmp_path: Path) -> None:
    told = polar(*collect, f"{tmp_path}/tasks.py:late", "--concurrency", "1", "--json")
    assert told.code == 2 and "the disk is gone" in told.json["error"]
    with open_reader(tmp_path / "new.duckdb") as reader:
        assert {rollout.status for rollout in reader.rollouts()} <= {"completed", "interrupted"}


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("nothing.py", "there is no file"),
        ("nothing", "no task source"),
        ("tasks.py:nothing", "no function nothing(split, seed)"),
        ("tasks.py:judge", "judge('train', 0) failed: TypeError"),
    ],
)
def test_sources_that_are_none(
    source: str, complaint: str, polar: Polar, collect: list[str], tmp_path: Path
) -> None:
    told = polar(*collect, tmp_path / source, "--json")
    assert told.code == 2 and complaint in told.json["error"]
    assert not (tmp_path / "new.duckdb").exists()


def test_what_it_refuses(polar: Polar, collect: list[str], tmp_path: Path) -> None:
    def complaint(*arguments: object) -> str:
        told = polar(*arguments, "--json")
        assert told.code in (2, 3, 4), told
        return str(told.json["error"])

    tasks = tmp_path / "tasks.py"
    store, engine, harness = (collect.index(name) + 1 for name in ("--store", "--engine", "--harness"))
    assert "is a directory" in complaint(*collect[:store], tmp_path, *collect[store + 1 :], tasks)
    assert "no harness recipe" in complaint(*collect[:harness], "emacs", *collect[harness + 1 :], tasks)
    nobody = "http://127.0.0.1:9"
    assert nobody in complaint(*collect[:engine], nobody, *collect[engine + 1 :], tasks)
    with Recorder(tmp_path / "new.duckdb"):
        assert "records into" in complaint(*collect, tasks)
