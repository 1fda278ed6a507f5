"""The loop of `rl` by itself: what runs when, what is recorded and saved, how it ends; the rest is fake."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.cli import rl_loop
from polar_mitm.cli.groups import Group, GroupRollout
from polar_mitm.cli.rl_config import RlConfig
from polar_mitm.cli.rl_loop import History, RlLoop
from polar_mitm.errors import EngineUnfit, SetupError, WeightsError
from polar_mitm.tasks import Task
from polar_mitm.upstream.weights import Updated
from polar_mitm_trainer.samples import Sample
from tests.trainer.stores import rollout

TASKS = """
from polar_mitm.tasks import Task

def tasks(split, seed):
    for n in range(3):
        yield Task(f"{split}-{seed}-{n}", "do it")
"""


class World:
    """All that a loop uses. `rewards` are those of every group, `log` is what happened."""

    def __init__(self, rewards: tuple[float | None, ...] = (0.0, 1.0)) -> None:
        self.rewards, self.log = rewards, list[str]()
        self.sampled_tokens = 5
        self.engine_failure: str | None = None
        self.version = 0
        self.made = 0
        self.rows: list[tuple[int, str, int]] = []
        self.saved: list[tuple[str, dict[str, Any]]] = []
        self.refuse: str | None = None
        self.stepping = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.begun: list[int] = []
        self.group_ids: list[str] = []

    # runner
    async def run(
        self, tasks: Iterable[Task], group_size: int, max_groups: int | None = None, *, prefix: str = ""
    ) -> AsyncIterator[Group]:
        """As the real one: at most `max_groups` are begun and not yet taken."""
        source, begun = iter(tasks), []
        while True:
            while len(begun) < (max_groups or 2) and (task := next(source, None)):
                self.made += 1
                self.begun.append(self.version)
                begun.append(self._group(task, group_size, prefix))
            if not begun:
                return
            yield begun[0]
            begun.pop(0)

    def _group(self, task: Task, size: int, prefix: str) -> Group:
        group_id = f"{prefix}{task.task_id}/{self.made}"
        self.group_ids.append(group_id)
        rewards = (self.rewards * size)[:size]
        rollouts = tuple(
            GroupRollout(
                f"{group_id}/{n}",
                n,
                "completed",
                "",
                exit_code=0,
                reward=reward,
                no_reward=None if reward is not None else "it failed",
                engine_failure=self.engine_failure,
                calls=1,
                sampled_tokens=self.sampled_tokens,
            )
            for n, reward in enumerate(rewards)
        )
        return Group(group_id, task, rollouts)

    # worker
    def step(self, samples: list[Sample]) -> dict[str, float]:
        self.stepping.set()
        assert self.go_on.wait(30)
        self.version += 1
        self.log.append(f"step {len(samples)}")
        return {"loss": 0.5, "mismatch_abs": 0.0}

    def save(self, folder: Path, position: dict[str, Any], keep_last: int) -> None:
        assert folder.name == f"step-{self.version}"
        self.saved.append((folder.name, position))

    # sync, database, board
    async def update(self, version: str, samples: Any = ()) -> Updated:
        if version == self.refuse:
            raise WeightsError("out of memory")
        self.log.append(f"engine {version}")
        return Updated(version, 0.0, 1e-5)

    def db_step(self, step: int, rows: Any, metrics: Any, *, policy_version: str, started_at: float) -> None:
        self.rows.append((step, policy_version, len(rows)))

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.log.append(f"evaluated {step}: {metrics['evaluation/reward']}")

    def add(self, step: int, metrics: dict[str, float]) -> None: ...


class _DB:
    def __init__(self, world: World) -> None:
        self.step, self.metrics = world.db_step, world.metrics


Start = Callable[..., RlLoop]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()

    def finished(store: Path, groups: list[Group], builder: str) -> list[Any]:
        """Rollouts as the store would have them, sampled by the weights that they were begun under."""
        found = []
        for group in groups:
            version = made.begun[int(group.group_id.rpartition("/")[2]) - 1]
            for each in group.rollouts:
                one = rollout(each.rollout_id, group.group_id, each.reward)
                for call in one.calls:
                    call.policy_version = f"step-{version}"
                found.append(one.finished)
        return found

    monkeypatch.setattr(rl_loop, "finished", finished)
    return made


@pytest.fixture
def loop(world: World, tmp_path: Path) -> Start:
    (tmp_path / "tasks.py").write_text(TASKS)

    def start(history: History | None = None, **tables: Any) -> RlLoop:
        config = RlConfig.model_validate(
            {
                "out": tmp_path / "run",
                "steps": 3,
                "engine": {"url": "http://127.0.0.1:1"},
                "policy": {"model": "tiny"},
                **tables,
                "rollouts": {
                    "tasks": str(tmp_path / "tasks.py"),
                    "group_size": 4,
                    "groups_per_step": 2,
                    **tables.get("rollouts", {}),
                },
            }
        )
        anything: Any = world
        return RlLoop(
            config,
            history or History(),
            store=tmp_path / "store",
            runner=anything,
            worker=anything,
            sync=anything,
            db=_DB(world),  # type: ignore[arg-type]
            board=anything,
        )

    return start


async def test_on_policy(world: World, loop: Start) -> None:
    await loop().run()
    assert world.log == ["engine step-0", *(w for n in "123" for w in ("step 8", f"engine step-{n}"))]
    assert world.begun == [0, 0, 1, 1, 2, 2]  # no group was begun under other weights than learn from it
    assert world.rows == [(n, f"step-{n}", 8) for n in (1, 2, 3)]
    assert world.saved == [("step-3", {"iteration": 3, "groups": 6})]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_async_begins_ahead_as_far_as_it_may(world: World, loop: Start, max_staleness: int) -> None:
    await loop(sync={"mode": "async", "max_staleness": max_staleness}, steps=5).run()
    lags = [n // 2 - begun for n, begun in enumerate(world.begun[:10])]
    assert max(lags) == max_staleness and min(lags) >= 0
    assert [rows for _, _, rows in world.rows] == [8] * 5  # none was too stale, so all was learned from


async def test_what_is_staler_is_masked(world: World, loop: Start) -> None:
    world.version = 5
    history = History(iteration=5, groups=0, version=5)
    world.begun = [3] * 100
    world.made = 0

    await loop(history, sync={"mode": "async", "max_staleness": 1}, steps=6).run()
    assert world.rows == [(6, "step-5", 0)] and "step 8" not in world.log


async def test_evaluations(world: World, loop: Start) -> None:
    await loop(evaluation={"num_tasks": 2, "samples": 4, "every": 2}, checkpoint={"every": 1}).run()
    assert [line for line in world.log if "evaluated" in line] == [
        "evaluated 0: 0.5", "evaluated 2: 0.5", "evaluated 3: 0.5",
    ]  # fmt: skip
    assert [name for name, _ in world.saved] == ["step-1", "step-2", "step-3"]
    # Who trains on the store later can tell them apart.
    assert all(each.startswith("evaluation:") == ("test-" in each) for each in world.group_ids)
    assert sum("test-" in each for each in world.group_ids) == 6


async def test_evaluations_are_of_the_newest_weights(world: World, loop: Start) -> None:
    await loop(sync={"mode": "async", "max_staleness": 1, "every": 2}, evaluation={"num_tasks": 2}).run()
    told = [line.partition(":")[0] for line in world.log]
    assert told == [
        "engine step-0", "evaluated 0", "step 8", "step 8", "engine step-2",
        "step 8", "engine step-3", "evaluated 3",
    ]  # fmt: skip


async def test_it_goes_on_from_a_position(world: World, loop: Start) -> None:
    world.version = 2
    await loop(History(iteration=2, groups=4, version=2, saved=2), evaluation={"num_tasks": 2}).run()
    assert world.log[0] == "engine step-2" and [step for step, *_ in world.rows] == [3]
    assert not any(line.startswith("evaluated 2") for line in world.log)


async def test_nothing_to_learn_is_no_step(world: World, loop: Start) -> None:
    world.rewards = (1.0,)
    await loop().run()
    assert world.log == ["engine step-0"] and world.rows == [(n, "step-0", 0) for n in (1, 2, 3)]
    assert world.saved == [("step-0", {"iteration": 3, "groups": 6})]


async def test_an_engine_that_refuses_loses_nothing(world: World, loop: Start) -> None:
    world.refuse = "step-2"
    with pytest.raises(WeightsError):
        await loop().run()
    assert world.rows == [(1, "step-1", 8), (2, "step-2", 8)]
    assert world.saved == [("step-2", {"iteration": 2, "groups": 4})]


async def test_a_step_that_was_begun_is_done_whole(world: World, loop: Start) -> None:
    world.go_on.clear()
    run = asyncio.create_task(loop().run())
    await asyncio.to_thread(world.stepping.wait, 30)
    run.cancel()
    await asyncio.sleep(0)
    world.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert world.saved == [("step-1", {"iteration": 1, "groups": 2})]


async def test_when_nobody_judges(world: World, loop: Start) -> None:
    world.rewards = (None,)
    with pytest.raises(SetupError, match="no rollout of a whole step was judged: it failed"):
        await loop().run()
    with pytest.raises(SetupError, match="no rollout of the evaluation was judged"):
        await loop(evaluation={"num_tasks": 2}).run()


async def test_when_the_engine_answers_no_more(world: World, loop: Start) -> None:
    world.sampled_tokens = 0
    with pytest.raises(EngineUnfit, match="answered no rollout"):
        await loop().run()


async def test_when_the_engine_answers_no_rollout_to_its_end(world: World, loop: Start) -> None:
    world.rewards, world.engine_failure = (None,), "connection refused"
    with pytest.raises(EngineUnfit, match="to its end: connection refused"):
        await loop().run()
