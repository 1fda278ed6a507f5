"""`polar-mitm collect`: groups of rollouts on a set of tasks, recorded with their rewards."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from polar_mitm.cli import loop
from polar_mitm.cli.engine import EngineOption, ModelOption, probed
from polar_mitm.cli.exits import SETUP, fail
from polar_mitm.cli.groups import Group, GroupRunner, Harness
from polar_mitm.cli.output import JsonFlag, err, plural, print_json, print_table, say, tell
from polar_mitm.cli.settings import ConfigOption, MaxTokensOption, settings_from
from polar_mitm.config import Settings
from polar_mitm.tasks import Task, load_tasks
from polar_mitm.upstream.engine import EngineInfo

EXAMPLES = (
    "$ polar-mitm collect -s runs.duckdb --harness pi --tasks tasks.py --num-tasks 32 --group-size 8\n\n"
    "$ polar-mitm collect -s test.duckdb --harness codex --tasks ./tasks --split test --json"
)
_MAX_ROWS = 40
_MAX_REASONS = 5
_BAR = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()


def collect(
    store: Annotated[
        Path,
        typer.Option("--store", "-s", metavar="FILE", help="DuckDB file to record into; made where missing."),
    ],
    harness: Annotated[
        str, typer.Option(metavar="NAME", help="claude-code, codex:login, qwen-code, a .toml, ...")
    ],
    tasks: Annotated[
        str, typer.Option(metavar="SOURCE", help="FILE.py, FILE.py:FUNCTION, or a folder of NAME/task.toml.")
    ],
    split: Annotated[str, typer.Option(metavar="NAME", help="Which of the tasks.")] = "train",
    num_tasks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N of them; else all there are.")
    ] = None,
    group_size: Annotated[int, typer.Option(min=1, metavar="G", help="Rollouts of each task.")] = 1,
    concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Harnesses at once; by default as the cores allow.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the tasks and their order.")] = 0,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="S", help="Seconds for a rollout whose task does not say."),
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="For the harness, as --argument=--verbose; repeatable."),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep each workspace, as DIR/ROLLOUT_ID.")
    ] = None,
    engine: EngineOption = None,
    model: ModelOption = "",
    max_tokens: MaxTokensOption = None,
    config: ConfigOption = None,
    json: JsonFlag = False,
) -> None:
    """Run a harness on many tasks, G times each; record what it did and its rewards.

    Each rollout has a sandbox and a workspace of its own. When it has ended,
    its task's reward judges the workspace, here and not in the sandbox: a
    reward that executes what the agent wrote executes it on this machine.

    A rollout that does not start, or has no verdict, is counted, and its group
    goes on. After Ctrl-C, what was recorded stays.
    """
    from polar_mitm.store.share import find_live

    if store.is_dir():
        fail(f"--store takes a file, and {store} is a directory")
    if live := find_live(store.absolute()):
        fail(f"process {live.pid} records into {store} already: stop it first, or use another store")
    chosen = itertools.islice(load_tasks(tasks, split, seed), num_tasks)
    ready = Harness.load(harness, arguments=argument or ())
    settings = ready.served(settings_from(config, max_tokens=max_tokens))
    info = probed(engine or settings.engine, model or settings.engine_model)
    options = {"concurrency": concurrency, "timeout_s": timeout, "keep": keep and keep.absolute()}
    began = time.monotonic()
    groups = loop.run(
        _collect(ready, settings, info, store.absolute(), chosen, num_tasks, group_size, options)
    )
    if not any(group["started"] for group in groups):
        fail(f"no rollout started: {next(iter(groups[0]['no_reward']))}", SETUP)
    seconds = round(time.monotonic() - began, 1)
    if json:
        print_json(_totals(groups) | {"seconds": seconds, "store": store, "split": split, "groups": groups})
    else:
        _tell(groups, seconds, store)


async def _collect(
    harness: Harness,
    settings: Settings,
    info: EngineInfo,
    store: Path,
    tasks: Iterable[Task],
    num_tasks: int | None,
    group_size: int,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Each group in brief: what harnesses printed, and tasks' files, are not kept."""
    from polar_mitm.cli.hosting import embedded

    groups: list[dict[str, Any]] = []
    rewards: list[float] = []
    async with embedded(settings, info, store) as host, GroupRunner(host, harness, **options) as runner:
        if host.interceptor.recorder.rescue_path:
            fail(f"{store} cannot be written", SETUP)
        with Progress(*_BAR, console=err, transient=True, disable=not err.is_terminal) as bar:
            shown = bar.add_task("collecting", total=num_tasks)
            async for group in runner.run(tasks, group_size):
                groups.append(_brief(group))
                rewards += group.rewards
                mean = fmean(rewards) if rewards else None
                bar.update(shown, advance=1, description=f"mean reward {_figure(mean)}")
    return groups


def _brief(group: Group) -> dict[str, Any]:
    rollouts = group.rollouts
    return {
        "group_id": group.group_id,
        "task_id": group.task.task_id,
        "rollout_ids": [each.rollout_id for each in rollouts],
        "rewards": [each.reward for each in rollouts],
        "statuses": Counter(each.status for each in rollouts),
        "started": sum(each.exit_code is not None for each in rollouts),
        "no_reward": Counter(each.no_reward for each in rollouts if each.no_reward),
        "incomplete": sum(each.incomplete is not None for each in rollouts),
        "calls": sum(each.calls for each in rollouts),
        "sampled_tokens": sum(each.sampled_tokens for each in rollouts),
    }


def _totals(groups: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = [each for group in groups for each in group["rewards"] if each is not None]
    told_apart = sum(len({each for each in group["rewards"] if each is not None}) > 1 for group in groups)
    return {
        "tasks": len(groups),
        "rollouts": sum(len(group["rollout_ids"]) for group in groups),
        "mean_reward": fmean(rewards) if rewards else None,
        "with_reward": len(rewards),
        "groups_of_unequal_rewards": told_apart,
        "statuses": sum((group["statuses"] for group in groups), Counter()),
        "no_reward": sum((group["no_reward"] for group in groups), Counter()),
        **{name: sum(group[name] for group in groups) for name in ("incomplete", "calls", "sampled_tokens")},
    }


def _tell(groups: list[dict[str, Any]], seconds: float, store: Path) -> None:
    rows = [
        (
            group["task_id"],
            len(group["rollout_ids"]),
            _figure(_totals([group])["mean_reward"]),
            _counts(group["statuses"]),
        )
        for group in groups[:_MAX_ROWS]
    ]
    print_table("task,rollouts,reward,statuses", rows)
    if len(groups) > _MAX_ROWS:
        tell(f"... and {len(groups) - _MAX_ROWS} more")
    total = _totals(groups)
    tell(
        f"{plural(total['tasks'], 'task')}, {plural(total['rollouts'], 'rollout')} in {seconds:.1f} s "
        f"({_counts(total['statuses'])}): "
        f"mean reward {_figure(total['mean_reward'])} of {total['with_reward']}, "
        f"{plural(total['calls'], 'call')}, {plural(total['sampled_tokens'], 'sampled token')}"
    )
    reasons = total["no_reward"].most_common()
    for why, number in reasons[:_MAX_REASONS]:
        say(f"{plural(number, 'rollout')} without a reward: {why}", style="yellow")
    if more := sum(number for _, number in reasons[_MAX_REASONS:]):
        say(f"{plural(more, 'rollout')} without a reward for other reasons: --json has them", style="yellow")
    if total["incomplete"]:
        say(f"{plural(total['incomplete'], 'rollout')} incomplete, and never trained on", style="red")
    say(f"store {store}")


def _counts(counted: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counted.items()))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
