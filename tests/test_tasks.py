"""Tasks and their sources."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.errors import TaskError
from polar_mitm.tasks import Task, load_tasks

ENDLESS = """
import random
from polar_mitm.tasks import Task
from beside import PROMPT

def tasks(split, seed):
    rng = random.Random(f"{split}/{seed}")
    while True:
        number = rng.randrange(1000)
        yield Task(f"{split}-{number}", PROMPT.format(number), {"n.txt": str(number)}, judge)

def judge(attempt):
    return attempt.stdout == attempt.task.files["n.txt"]

def none(split, seed):
    return []

def broken(split, seed):
    yield Task("one", "do it")
    raise KeyError("two")

def wrong(split, seed):
    yield "a task"

def not_iterable(split, seed):
    return 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text('PROMPT = "write {}"\n')
    path = tmp_path / "endless.py"
    path.write_text(ENDLESS)
    return path


def take(source: str | Path, n: int, **options: Any) -> list[Task]:
    return list(itertools.islice(load_tasks(source, **options), n))


def test_a_python_file(file: Path) -> None:
    first = take(file, 50, split="train", seed=1)
    assert [t.prompt for t in first] == [f"write {t.files['n.txt']}" for t in first]
    same, other, test = (take(f"{file}:tasks", 50, split=s, seed=n) for s, n in
                         (("train", 1), ("train", 2), ("test", 1)))  # fmt: skip
    ids = [[t.task_id for t in tasks] for tasks in (first, same, other, test)]
    assert ids[0] == ids[1] and ids[0] != ids[2]
    assert all(task_id.startswith("test-") for task_id in ids[3])


def test_a_folder(tmp_path: Path) -> None:
    for name, split in (("a", "train"), ("b", "test"), ("c", "train"), ("d", "train")):
        files = tmp_path / name / "files" / "src"
        files.mkdir(parents=True)
        (files / "x.bin").write_bytes(b"\xff\x00" + name.encode())
        (tmp_path / name / "check.py").write_text("print(1)")
        (tmp_path / name / "task.toml").write_text(
            f'prompt = "do {name}"\nreward = ["python", "{{folder}}/check.py"]\ntimeout_s = 5\n'
            + ('split = "test"\n' if split == "test" else "")
            + '[metadata]\nanswer = 42\n'
        )  # fmt: skip
    (task,) = load_tasks(tmp_path, "test")
    assert task == Task(
        "b",
        "do b",
        {"src/x.bin": b"\xff\x00b"},
        ["python", str(tmp_path / "b" / "check.py")],
        timeout_s=5,
        metadata={"answer": 42},
    )
    orders = {tuple(t.task_id for t in load_tasks(tmp_path, "train", seed)) for seed in range(20)}
    assert {frozenset(order) for order in orders} == {frozenset("acd")} and len(orders) > 1
    assert len({tuple(t.task_id for t in load_tasks(tmp_path, "train", 3)) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"task_id": ""}, "task_id"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"files": {"../x": ""}}, "inside the workspace"),
        ({"files": {"/etc/x": ""}}, "inside the workspace"),
        ({"files": {"": ""}}, "inside the workspace"),
        ({"files": {"x": 3}}, "neither text nor bytes"),
        ({"files": {"x": "", "x/y": ""}}, "below a file"),
        ({"reward": "python check.py"}, "list of strings"),
        ({"reward": []}, "list of strings"),
        ({"reward": ["python", 3]}, "list of strings"),
        ({"timeout_s": 0}, "positive"),
        ({"timeout_s": float("nan")}, "positive"),
        ({"reward_timeout_s": -1}, "positive"),
    ],
)
def test_a_task_that_makes_no_sense(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TaskError, match=complaint):
        Task(**{"task_id": "t", "prompt": "p", **fields})


def test_sources_that_fail(file: Path, tmp_path: Path) -> None:
    def complaint(source: object, n: int = 9) -> str:
        with pytest.raises(TaskError) as raised:
            take(str(source), n)
        return str(raised.value)

    assert "no task source" in complaint(tmp_path / "nothing")
    assert "there is no file" in complaint(tmp_path / "nothing.py")
    assert "no function other(split, seed)" in complaint(f"{file}:other")
    assert "no tasks in split 'train'" in complaint(f"{file}:none")
    assert "'a task', which is no" in complaint(f"{file}:wrong")
    assert "gave 7, and not tasks" in complaint(f"{file}:not_iterable")
    assert len(take(f"{file}:broken", 1)) == 1
    assert f"KeyError('two') at {file}:" in complaint(f"{file}:broken")
    (tmp_path / "syntax.py").write_text("def tasks(:\n")
    assert "cannot be loaded: SyntaxError" in complaint(tmp_path / "syntax.py")

    folder = tmp_path / "set"
    folder.mkdir()
    assert "no NAME/task.toml" in complaint(folder)
    (folder / "one").mkdir()
    toml = folder / "one" / "task.toml"
    for text, words in (
        ("prompt = ", "cannot be read"),
        ('promt = "x"', "unknown key promt"),
        ("timeout_s = 3", "has no prompt"),
        ('prompt = "x"\ntimeout_s = -3', "positive"),
        ('prompt = "x"\ntimeout_s = "soon"', "TypeError"),
        ('prompt = "x"\nsplit = "other"', "no tasks in split"),
    ):
        toml.write_text(text)
        assert words in complaint(folder)
