"""Groups of rollouts in real sandboxes: harnesses, deadlines, rewards that fail, agents that mean harm."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.cache import default_cache
from polar_mitm.cli import groups
from polar_mitm.cli.groups import REWARD, Group, GroupRunner, Harness
from polar_mitm.cli.hosting import EmbeddedHost, embedded
from polar_mitm.cli.rollout import Job, Outcome
from polar_mitm.config import Settings
from polar_mitm.conformance.scripts import Answer, Script, shell_call
from polar_mitm.errors import SetupError
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from polar_mitm.store.schema import StoreLocked
from polar_mitm.tasks import Attempt, Task
from polar_mitm.types import Reward, Rollout
from polar_mitm.upstream.probe import probe
from tests.cli.test_run import ASK
from tests.e2e.conftest import Cli, until
from tests.e2e.engines import HarnessEngine, is_probe, told_by_tool
from tests.sandbox.users import User, kinds

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

Hosted = Callable[[HarnessEngine], AbstractAsyncContextManager[EmbeddedHost]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store" / "groups.duckdb"


@pytest.fixture
def hosted(store: Path) -> Hosted:
    """An interceptor in front of an engine."""

    @asynccontextmanager
    async def open_host(engine: HarnessEngine) -> AsyncIterator[EmbeddedHost]:
        async with embedded(Settings(), await probe(engine.url), store) as host:
            yield host

    return open_host


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where runners work; nothing may be left in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert [path for path in folder.iterdir() if "groups" in path.name] == []


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Harness]:
    """A harness of our own: a program that is given the prompt as its last argument."""

    def load(name: str = "sh") -> Harness:
        recipe = tmp_path / "program.toml"
        recipe.write_text(f'[run]\nprogram = {json.dumps(name)}\nargv = ["-c", "{{prompt}}"]\n')
        return Harness.load(str(recipe))

    return load


async def all_of(runner: GroupRunner, tasks: Any, group_size: int, **options: Any) -> list[Group]:
    async with runner:
        return [group async for group in runner.run(tasks, group_size, **options)]


def recorded(store: Path) -> tuple[dict[str, Rollout], dict[str, list[Reward]]]:
    with open_reader(store) as reader:
        rollouts, rewards = reader.rollouts(), reader.rewards()
    return {r.rollout_id: r for r in rollouts}, {
        r.rollout_id: [each for each in rewards if each.rollout_id == r.rollout_id] for r in rollouts
    }


# --- real harnesses -------------------------------------------------------------------------------------


def right_every_other_time() -> Script:
    """Copies a file as the prompt asks, or every second time something else."""
    begun = itertools.count()

    def script(request: dict[str, Any], nth: int) -> Answer:
        command = "cat task.txt > answer.txt"
        if is_probe(request) or shell_call(request, command) is None or told_by_tool(request):
            return Answer(text="Copied.")
        call = shell_call(request, command if next(begun) % 2 else "echo wrong > answer.txt")
        return Answer(text="Copying.", tool_calls=(call,) if call else ())

    return script


def copied(attempt: Attempt) -> Any:
    assert attempt.stdout.rstrip().endswith("Copied.") and attempt.exit_code == 0
    found = attempt.workspace.joinpath("answer.txt").read_text()
    right = found == attempt.task.files["task.txt"]
    return {REWARD: right, "evidence": found, "length": len(found)}


@pytest.mark.parametrize("name", ["sdk-agent", "pi", "claude-code"])
async def test_harnesses_in_groups(name: str, hosted: Hosted, store: Path) -> None:
    tasks = [Task(f"copy-{n}", "Copy task.txt to answer.txt.", {"task.txt": f"{n}\n"}, copied) for n in "ab"]
    async with HarnessEngine(right_every_other_time()) as engine:
        async with hosted(engine) as host:
            runner = GroupRunner(host, Harness.load(name), concurrency=3)
            done = await all_of(runner, tasks, 3)
        asked = engine.asked

    assert {group.task.task_id for group in done} == {"copy-a", "copy-b"}
    rollouts, rewards = recorded(store)
    assert len(rollouts) == 6
    for group in done:
        assert [each.sample_index for each in group.rollouts] == [0, 1, 2]
        for each in group.rollouts:
            row = rollouts[each.rollout_id]
            assert (row.group_id, row.task_id) == (group.group_id, group.task.task_id)
            assert (row.sample_index, row.harness) == (each.sample_index, name)
            assert (row.status, row.incomplete, each.status, each.no_reward) == (
                "completed", None, "completed", None,
            )  # fmt: skip
            by_name = {reward.name: reward for reward in rewards[each.rollout_id]}
            assert set(by_name) == {REWARD, "length"}
            verdict = by_name[REWARD]
            assert (verdict.value, verdict.verifier) == (each.reward, "copied")
            assert each.reward == float(verdict.evidence == group.task.files["task.txt"])
            assert each.calls == 2 and each.workspace is None
        # A trainer finds in the store what it needs.
        with open_reader(store) as reader:
            for each in group.rollouts:
                trajectories, report = build(reader.calls(each.rollout_id), rollout=rollouts[each.rollout_id])
                assert len(trajectories) == 1 and report.trained == report.sampled == each.sampled_tokens
    assert sorted(reward for group in done for reward in group.rewards) == [0.0] * 3 + [1.0] * 3
    assert len(asked) == 12


# --- endings --------------------------------------------------------------------------------------------


async def test_a_deadline_keeps_the_partial_trajectory(
    hosted: Hosted, store: Path, program: Callable[..., Harness]
) -> None:
    def half(attempt: Attempt) -> float:
        assert (attempt.status, attempt.exit_code) == ("timeout", 124)
        return 0.5 if attempt.workspace.joinpath("begun").is_file() else 0.0

    code = f"{ASK}\nopen('begun', 'w').close()\nprint('so far', flush=True)\nimport time; time.sleep(1000)"
    task = Task("slow", code, reward=half, timeout_s=15)
    async with HarnessEngine() as engine, hosted(engine) as host:
        runner = GroupRunner(host, program(sys.executable), timeout_s=1000)
        ((first, second),) = [group.rollouts for group in await all_of(runner, [task], 2)]
    rollouts, rewards = recorded(store)
    for each in (first, second):
        assert (each.status, each.exit_code, each.reward, each.calls) == ("timeout", 124, 0.5, 1)
        assert each.stdout.endswith("so far\n") and each.sampled_tokens > 0 and each.incomplete is None
        assert rollouts[each.rollout_id].status == "timeout"
        assert [r.value for r in rewards[each.rollout_id]] == [0.5]
        with open_reader(store) as reader:
            _, report = build(reader.calls(each.rollout_id), rollout=rollouts[each.rollout_id])
        assert report.trained == each.sampled_tokens


async def test_what_fails_does_not_sink_its_group(
    hosted: Hosted, store: Path, program: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = groups.run_rollout

    async def second_does_not_start(job: Job, host: EmbeddedHost, rollout: Rollout) -> Outcome:
        if job.sample_index == 1:
            raise SetupError("no sandbox today")
        return await real(job, host, rollout)

    def third_raises(attempt: Attempt) -> float:
        return {"0": 0.25, "3": 0.75}[attempt.stdout.strip()]

    monkeypatch.setattr(groups, "run_rollout", second_does_not_start)
    task = Task("some", "echo $((N++)); exit 7", reward=third_raises)
    indices = itertools.count()

    class Numbered(Harness):
        def job(self, prompt: str) -> Job:
            return super().job(prompt.replace("$((N++))", str(next(indices))))

    harness = program()
    async with HarnessEngine() as engine, hosted(engine) as host:
        runner = GroupRunner(host, Numbered(harness.recipe, None))
        (group,) = await all_of(runner, [task], 4)
    assert group.rewards == [0.25, 0.75]
    assert [(each.status, each.exit_code, each.reward) for each in group.rollouts] == [
        ("failed", 7, 0.25),
        ("failed", None, None),
        ("failed", 7, None),
        ("failed", 7, 0.75),
    ]
    _, unstarted, unjudged, _ = group.rollouts
    assert unstarted.no_reward == "it did not start: no sandbox today"
    assert unjudged.no_reward and "KeyError('2')" in unjudged.no_reward
    rollouts, rewards = recorded(store)
    assert {r.group_id for r in rollouts.values()} == {group.group_id} and len(rollouts) == 4
    assert {i: len(rows) for i, rows in rewards.items()} == {
        each.rollout_id: 0 if each.reward is None else 1 for each in group.rollouts
    }
    assert rollouts[unstarted.rollout_id].stop_reason == unstarted.no_reward
    assert rollouts[unstarted.rollout_id].status == "failed" and rollouts[unstarted.rollout_id].ended_at
    assert rollouts[unjudged.rollout_id].stop_reason == f"exit 7; no reward: {unjudged.no_reward}"


async def test_what_the_engine_fails_at_is_not_judged(
    hosted: Hosted, store: Path, program: Callable[..., Harness]
) -> None:
    """Unless it answered in the end, or the prompt was too long, which is the agent's doing."""
    too_long = {"error": {"message": "This model's maximum context length is 9 tokens."}}
    refusals = {
        "down": itertools.repeat(Answer(status=500)),
        "again": iter([Answer(status=500)]),
        "long": itertools.repeat(Answer(status=400, error=too_long)),
    }

    def script(request: dict[str, Any], nth: int) -> Answer:
        fine = Answer(text="fine")
        return fine if is_probe(request) else next(refusals[request["messages"][-1]["content"]], fine)

    def ask(kind: str) -> str:
        once = ASK.replace('"go"', repr(kind))
        return f"ask = {once!r}\ntry: exec(ask)\nexcept OSError: exec(ask)"

    tasks = [Task(kind, ask(kind), reward=lambda attempt: attempt.exit_code) for kind in refusals]
    async with HarnessEngine(script) as engine, hosted(engine) as host:
        done = await all_of(GroupRunner(host, program(sys.executable)), tasks, 1)
    by_kind = {group.task.task_id: group.rollouts[0] for group in done}
    assert {kind: each.reward for kind, each in by_kind.items()} == {"down": None, "again": 0.0, "long": 1.0}
    assert (by_kind["down"].no_reward or "").startswith("the engine failed: overloaded: ")
    rollouts, _ = recorded(store)
    assert "no reward: the engine failed" in (rollouts[by_kind["down"].rollout_id].stop_reason or "")


async def test_tasks_that_cannot_be_made(
    hosted: Hosted, store: Path, program: Callable[..., Harness], tmp_path: Path
) -> None:
    """No such program; a file name that no file system takes; no reward at all."""
    long = Task("long", "true", {"x" * 300: ""}, reward=lambda a: 1)
    unjudged = Task("unjudged", "echo done")
    async with HarnessEngine() as engine, hosted(engine) as host:
        by_id = {
            g.task.task_id: g.rollouts[0]
            for g in await all_of(GroupRunner(host, program()), [long, unjudged], 1)
        }
        missing = await all_of(GroupRunner(host, program("no-such-program")), [unjudged], 2)
    assert by_id["long"].exit_code is None and "File name too long" in by_id["long"].stop_reason
    assert (by_id["unjudged"].status, by_id["unjudged"].stdout) == ("completed", "done\n")
    assert by_id["unjudged"].reward is None and by_id["unjudged"].no_reward == "nobody judges this task"
    assert ["no-such-program" in each.stop_reason for each in missing[0].rollouts] == [True, True]
    rollouts, _ = recorded(store)
    assert sorted(r.status for r in rollouts.values()) == ["completed", "failed", "failed", "failed"]


async def test_an_agent_that_means_harm(
    hosted: Hosted, program: Callable[..., Harness], tmp_path: Path
) -> None:
    """Links out of the workspace, a pipe without an end, a file of a terabyte, no end of words."""
    secret = tmp_path / "secret"
    secret.write_text("right")
    attack = (
        f"ln -s {secret} answer; ln -s / root; ln -s /proc/self/root{secret} proc; mkfifo pipe; mkdir shut;"
        "touch shut/x; chmod 0 shut; ln -s . loop; yes | head -c 5000000; echo; echo the end"
    )
    seen = {}

    def judge(attempt: Attempt) -> float:
        seen[attempt.task.task_id] = {
            path.relative_to(attempt.workspace).as_posix() for path in attempt.workspace.rglob("*")
        }
        assert len(attempt.stdout) <= 1 << 20 and attempt.stdout.endswith("\nthe end\n")
        found = [path.read_text() for path in attempt.workspace.rglob("*") if path.is_file()]
        return float("right" in found)

    sparse = "truncate -s 1T sparse; echo; echo the end"
    tasks = [Task("links", attack, {"kept": "mine"}, judge), Task("sparse", sparse, reward=judge)]
    async with HarnessEngine() as engine, hosted(engine) as host:
        done = await all_of(GroupRunner(host, program()), tasks, 2)
    for group in done:
        for each in group.rollouts:
            assert each.status == "completed", each
            if group.task.task_id == "links":
                assert each.reward == 0.0, each
            else:
                assert each.reward is None and each.no_reward and "holds more than" in each.no_reward
    assert seen["links"] - {"shut/x"} == {"kept", "shut", "loop"} and "sparse" not in seen


# --- many -----------------------------------------------------------------------------------------------


async def test_so_many_at_once_and_so_far_ahead(
    hosted: Hosted, program: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, running, most = groups.run_rollout, 0, 0

    async def counted(*arguments: Any) -> Outcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await real(*arguments)
        finally:
            running -= 1

    monkeypatch.setattr(groups, "run_rollout", counted)
    drawn = itertools.count()
    endless = (Task(f"t{next(drawn)}", "true", reward=lambda a: 1) for _ in itertools.count())
    async with HarnessEngine() as engine, hosted(engine) as host:
        async with GroupRunner(host, program(), concurrency=3) as runner:
            taken = []
            async for group in runner.run(endless, 2, max_groups=4):
                taken.append(group)
                if len(taken) == 6:
                    await asyncio.sleep(1)  # nobody takes: no more than four others are begun meanwhile
                    break
        assert next(drawn) <= 6 + 4
    assert most == 3
    assert len({group.group_id for group in taken}) == 6
    assert all(group.rewards == [1.0, 1.0] for group in taken)


async def test_the_same_task_again_is_another_group(
    hosted: Hosted, program: Callable[..., Harness], tmp_path: Path
) -> None:
    count = ["sh", "-c", "wc -l < here.txt"]
    task = Task("again", "cat here.txt; echo more >> here.txt", {"here.txt": "fresh\n"}, count)
    keep = tmp_path / "kept"
    async with HarnessEngine() as engine, hosted(engine) as host:
        done = await all_of(GroupRunner(host, program(), keep=keep), [task, task], 2)
    assert len({group.group_id for group in done}) == 2
    for each in (each for group in done for each in group.rollouts):
        assert (each.stdout, each.reward) == ("fresh\n", 2.0)
        assert each.workspace == keep / each.rollout_id
        assert each.workspace.joinpath("here.txt").read_text() == "fresh\nmore\n"


async def test_leaving_the_block_ends_what_runs(
    hosted: Hosted, store: Path, program: Callable[..., Harness]
) -> None:
    mark = uuid.uuid4().hex
    tasks = [Task("quick", "true", reward=lambda a: 1), Task("long", f"sleep 1000; echo {mark}")]
    async with HarnessEngine() as engine, hosted(engine) as host:
        async with GroupRunner(host, program(), concurrency=8) as runner:
            async for group in runner.run(tasks, 2):
                assert group.task.task_id == "quick"
                await until(lambda: len(processes(mark)) >= 2, "the long ones to run")
                break
        assert processes(mark) == {}
    rollouts, rewards = recorded(store)
    assert sorted(r.status for r in rollouts.values()) == ["completed"] * 2 + ["interrupted"] * 2
    assert sum(map(len, rewards.values())) == 2


def processes(mark: str) -> dict[int, str]:
    """Processes with the mark in their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:  # it has ended
            continue
        if mark.encode() in text:
            found[int(path.parent.name)] = text.replace(b"\0", b" ").decode()
    return found


def began_too_late(process: str) -> bool:
    """Whether it is a bubblewrap whose killed monitor never lets it begin (see `sandbox/README.md`)."""
    return Path(process.split()[0]).name == "bwrap"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_a_killed_collect_loses_no_committed_record(
    number: signal.Signals, cli: Cli, store: Path, tmp_path: Path, program: Callable[..., Harness]
) -> None:
    mark = uuid.uuid4().hex
    program(sys.executable)
    tasks = tmp_path / "endless.py"
    tasks.write_text(
        "import itertools\nfrom polar_mitm.tasks import Task\n"
        "def tasks(split, seed):\n"
        f"    for n in itertools.count(): yield Task(str(n), {ASK + '# ' + mark!r}, reward=judge)\n"
        "def judge(attempt): return len(attempt.stdout)\n"
    )
    async with HarnessEngine() as engine:
        options = ["--harness", tmp_path / "program.toml", "--tasks", tasks, "--group-size", "2"]
        run = await cli.start("collect", "--store", store, "--engine", engine.url, *options)

        def seen() -> dict[str, Reward]:
            if not store.exists():
                return {}
            try:
                with open_reader(store) as reader:
                    return {reward.rollout_id: reward for reward in reader.rewards()}
            except StoreLocked:  # it is starting: the file is taken, and not yet shared
                return {}

        async def rewarded() -> dict[str, Reward]:
            while len(found := await asyncio.to_thread(seen)) < 5:
                assert run.process.returncode is None, await run.ended()
                await asyncio.sleep(0.1)
            return found

        async with asyncio.timeout(120):
            before = await rewarded()
        run.interrupt(number)
        ended = await run.ended()
    assert ended.code == (130 if number == signal.SIGINT else -signal.SIGKILL), ended.err
    await until(lambda: not [p for p in processes(mark).values() if not began_too_late(p)], "all to end")
    for pid in processes(mark):
        assert number == signal.SIGKILL
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    rollouts, rewards = recorded(store)
    assert before.items() <= {i: rows[0] for i, rows in rewards.items() if rows}.items()
    for rollout_id in before:
        assert (rollouts[rollout_id].status, rollouts[rollout_id].incomplete) == ("completed", None)
        with open_reader(store) as reader:
            (call,) = reader.calls(rollout_id)
        assert call.status == "ok" and call.completion_token_ids
    if number == signal.SIGINT:
        assert {r.status for r in rollouts.values()} <= {"completed", "interrupted"}
        return
    # The next one goes on with the store; what was running is never trained on.
    async with HarnessEngine() as engine:
        again = await cli(
            "collect", "--store", store, "--engine", engine.url, *options, "--num-tasks", "1", "--json"
        )
    assert again.code == 0 and again.json()["with_reward"] == 2, again.err
    rollouts, rewards = recorded(store)
    left = [r for r in rollouts.values() if r.status != "completed"]
    assert all(r.status == "interrupted" and r.incomplete for r in left)
    assert before.items() <= {i: rows[0] for i, rows in rewards.items() if rows}.items()


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind == "user"])
async def test_without_root(kind: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user's workspaces are removed too, whatever modes the agent left."""
    monkeypatch.setattr(tempfile, "tempdir", None)  # a directory that this user may enter
    user = User(kind, "", Path())
    with user.directory() as home:
        tasks, recipe, store = home / "tasks.py", home / "sh.toml", home / "new.duckdb"
        recipe.write_text('[run]\nprogram = "sh"\nargv = ["-c", "{prompt}"]\n')
        tasks.write_text(
            "from polar_mitm.tasks import Task\n"
            "def tasks(split, seed): yield Task('t', 'mkdir -p a/b; touch a/x; chmod 0 a/b a', {}, judge)\n"
            "def judge(attempt): return len(list(attempt.workspace.iterdir())) + attempt.exit_code\n"
        )
        for path in (tasks, recipe):
            path.chmod(0o644)
        cli.become = user.become()
        cli.env |= {"HOME": str(home), "POLAR_MITM_CACHE": str(default_cache()), "TMPDIR": str(home)}
        async with HarnessEngine() as engine:
            done = await cli(
                *("collect", "--store", store, "--engine", engine.url, "--harness", recipe),
                *("--tasks", tasks, "--group-size", "2", "--json"),
            )
        assert done.code == 0 and done.json()["groups"][0]["rewards"] == [1.0, 1.0], done.err
        assert sorted(path.name for path in home.iterdir() if path.suffix != ".pyc") == [
            "new.duckdb", "sh.toml", "tasks.py",
        ]  # fmt: skip
