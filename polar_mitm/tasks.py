"""What agents are given to do, and where tasks come from: a Python file, or a folder of small folders."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from polar_mitm.errors import TaskError
from polar_mitm.types import RolloutStatus

_FUNCTION = "tasks"
_FILE_KEYS = {"prompt", "reward", "timeout_s", "reward_timeout_s", "split", "metadata"}


@dataclass(frozen=True)
class Task:
    """One thing to do, and how it is judged.

    Attributes:
        task_id: the same for the same task, whenever and wherever it is run.
        prompt: what the harness is told.
        files: what its workspace holds at first: relative path -> content.
        reward: judges what it left, on the host, once it has ended: a function of an `Attempt`, or a
            command (`polar_mitm.rewards` says how both are called). None: nobody does.
        timeout_s: for one rollout; the runner's own by default.
        reward_timeout_s: for the verdict.
        metadata: anything that a reward needs to know, such as the right answer; JSON for a command's.

    Raises:
        TaskError: it makes no sense.
    """

    task_id: str
    prompt: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    reward: RewardFunction | Sequence[str] | None = None
    timeout_s: float | None = None
    reward_timeout_s: float = 60.0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.task_id or not isinstance(self.task_id, str):
            raise TaskError(f"a task needs a task_id, not {self.task_id!r}")
        if not self.prompt or not isinstance(self.prompt, str) or "\0" in self.prompt:
            raise TaskError(f"task {self.task_id}: a prompt is some text without NUL")
        for name, content in self.files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise TaskError(f"task {self.task_id}: {name!r} is no path inside the workspace")
            if any(str(parent) in self.files for parent in path.parents):
                raise TaskError(f"task {self.task_id}: {name!r} lies below a file")
            if not isinstance(content, str | bytes):
                raise TaskError(f"task {self.task_id}: file {name} is neither text nor bytes")
        if not (self.reward is None or callable(self.reward) or _is_command(self.reward)):
            raise TaskError(f"task {self.task_id}: a reward is a function, or a command as a list of strings")
        for seconds in (self.timeout_s, self.reward_timeout_s):
            if seconds is not None and (isinstance(seconds, bool) or not 0 < seconds < float("inf")):
                raise TaskError(f"task {self.task_id}: a timeout is a positive number of seconds")


@dataclass(frozen=True)
class Attempt:
    """What one rollout of a task left, for its verdict.

    Attributes:
        workspace: a copy of the workspace as the harness left it, to be used at will; no link in it leads
            out of it. Its content is the agent's: a reward that runs any of it runs it on the host.
        stdout: what the harness printed, most often the agent's last words; the end of it, if long.
        exit_code: the harness's own, 124 after the deadline.
        status: "completed", "failed" (another exit code than 0) or "timeout".
    """

    task: Task
    workspace: Path
    stdout: str
    exit_code: int
    status: RolloutStatus


RewardFunction = Callable[[Attempt], Any]
"""float, bool, (float, evidence), or {"reward": float, "evidence": str, any further name: float}."""


def load_tasks(source: str | Path, split: str = "train", seed: int = 0) -> Iterator[Task]:
    """The tasks of a source, one after the other, maybe endlessly; the same for the same arguments.

    Args:
        source: `FILE.py` with a function `tasks(split: str, seed: int) -> Iterable[Task]`, or
            `FILE.py:FUNCTION`; or a folder of folders `NAME/task.toml` and `NAME/files/`. In `task.toml`:
            `prompt`; `reward`, a command in which `{folder}` stands for the folder NAME; and, if wanted,
            `split` ("train" by default), `timeout_s`, `reward_timeout_s` and a table `metadata`.
        split: which of them, such as "train" or "test".
        seed: of whatever is drawn; a folder's tasks come in an order by it.

    Raises:
        TaskError: there is no such source, it is broken, or it has no tasks; says what to do. A task that
            is wrong raises when its turn comes.
    """
    if Path(source).is_dir():
        return _checked(_from_folder(Path(source), split, seed), source, split)
    file, dot_py, function = str(source).rpartition(".py")
    if not dot_py or function[:1] not in ("", ":"):
        raise TaskError(f"{source} is no task source: give FILE.py, FILE.py:FUNCTION or a folder that exists")
    made = _called(Path(file + dot_py), function[1:] or _FUNCTION, split, seed)
    return _checked(made, source, split)


def located(error: BaseException) -> str:
    """What was raised, and where, for people who wrote the code that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error!r} at {last.filename}:{last.lineno}"


def _checked(tasks: Iterable[Any], source: object, split: str) -> Iterator[Task]:
    """Them, with errors that name their source; at least one. The first is made at once."""

    def each() -> Iterator[Task]:
        iterator = iter(tasks)
        while True:
            try:
                task = next(iterator)
            except StopIteration:
                return
            except TaskError as error:
                raise TaskError(f"{source}: {error}") from error
            except Exception as error:
                raise TaskError(f"{source} failed as it made a task: {located(error)}") from error
            if not isinstance(task, Task):
                raise TaskError(f"{source} gave {task!r}, which is no polar_mitm.tasks.Task")
            yield task

    rest = each()
    first = next(rest, None)
    if first is None:
        raise TaskError(f"{source} has no tasks in split {split!r}")

    def all_of_them() -> Iterator[Task]:
        yield first
        yield from rest

    return all_of_them()


# --- a Python file --------------------------------------------------------------------------------------


def _called(path: Path, name: str, split: str, seed: int) -> Iterable[Any]:
    function = getattr(_module(path), name, None)
    if not callable(function):
        raise TaskError(f"{path} has no function {name}(split, seed)")
    try:
        made = function(split, seed)
    except Exception as error:
        raise TaskError(f"{path}: {name}({split!r}, {seed}) failed: {located(error)}") from error
    if not isinstance(made, Iterable):
        raise TaskError(f"{path}: {name}({split!r}, {seed}) gave {made!r}, and not tasks")
    return made


def _module(path: Path) -> ModuleType:
    """The file as a module of a name of its own; what lies beside it can be imported by it."""
    path = path.resolve()
    name = f"polar_mitm_tasks_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise TaskError(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise TaskError(f"{path} cannot be loaded: {located(error)}") from error
    return module


# --- a folder -------------------------------------------------------------------------------------------


def _from_folder(root: Path, split: str, seed: int) -> Iterator[Task]:
    folders = sorted(path.parent for path in root.glob("*/task.toml"))
    if not folders:
        raise TaskError("no NAME/task.toml in it")
    random.Random(seed).shuffle(folders)
    for folder in folders:
        given = _toml(folder / "task.toml")
        if given.pop("split", "train") == split:
            if isinstance(command := given.get("reward"), list):
                given["reward"] = [str(each).replace("{folder}", str(folder.resolve())) for each in command]
            yield Task(folder.name, files=_files(folder / "files"), **given)


def _toml(path: Path) -> dict[str, Any]:
    try:
        given = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {error}") from error
    if unknown := set(given) - _FILE_KEYS:
        raise TaskError(f"{path}: unknown key {', '.join(sorted(unknown))}")
    if "prompt" not in given:
        raise TaskError(f"{path} has no prompt")
    return given


def _files(folder: Path) -> dict[str, bytes]:
    """All that is below a folder; its links are the task's author's own, and followed."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _is_command(given: object) -> bool:
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        return False
    return all(isinstance(each, str) and "\0" not in each for each in given)
