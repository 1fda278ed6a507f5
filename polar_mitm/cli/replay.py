"""`polar-mitm replay`: a recorded rollout once more, on its recorded answers; live from some call on."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from polar_mitm.cli import loop
from polar_mitm.cli.engine import EngineOption, ModelOption, probed
from polar_mitm.cli.exits import ENGINE, NO, fail
from polar_mitm.cli.output import JsonFlag, plural, print_json, say
from polar_mitm.cli.reading import StoreOption, chosen, reading
from polar_mitm.cli.replay_report import is_exact, tell_report
from polar_mitm.cli.rollout import Job, Outcome, run_rollout
from polar_mitm.cli.run import install, job_of, pairs, workspace
from polar_mitm.cli.settings import ConfigOption, settings_from
from polar_mitm.config import Settings
from polar_mitm.dialects.routes import PROVIDER_OF
from polar_mitm.replay import Replay
from polar_mitm.types import ModelCall, Rollout
from polar_mitm.upstream.engine import EngineInfo

EXAMPLES = (
    "$ polar-mitm replay 7Q2ZK8 -s runs.duckdb --fast\n\n"
    "$ polar-mitm replay 7Q2ZK8 -s runs.duckdb --task-dir ./task --json | jq .steps\n\n"
    "$ polar-mitm replay 7Q2ZK8 -s runs.duckdb --fork-at 5PDT2A --engine http://gpu-box:8000"
)
_MIN_TIMEOUT_S = 60.0
_LATER = 3.0
"""A replay may take this many times as long as what it replays before it counts as stuck."""
_FORK = ("call_id", "parent_call_id", "continuation", "fallback", "edits")


def replay(
    rollout: Annotated[str, typer.Argument(metavar="ROLLOUT", help="A rollout's id, or the end of it.")],
    store: StoreOption,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="What to run instead of the recorded command."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Answer as fast as possible, not at the recorded pace.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="DuckDB file to record the fresh run into; a fork's is --store."),
    ] = None,
    fork_at: Annotated[
        str | None,
        typer.Option(metavar="CALL", help="Replay up to this call, and ask the engine from there on."),
    ] = None,
    engine: EngineOption = None,
    model: ModelOption = "",
    config: ConfigOption = None,
    harness: Annotated[
        str | None, typer.Option(metavar="NAME", help="Recipe, where it is not the recorded one's name.")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Becomes /workspace, read-write; else a new directory.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, metavar="S", help="Seconds after which all of it is killed.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the command; repeatable.")
    ] = None,
    read_only: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Further host path to show; repeatable.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run a recorded rollout again on its recorded answers.

    The same harness runs in a new sandbox, without an engine: each of its
    model calls gets the bytes that the recorded one got. What it asks is
    compared, field by field, after a declared list of what varies between any
    two runs. Give it what the recorded run had: its files by --task-dir, its
    variables by --env.

    --fork-at goes on live from a call, as a new rollout of the same group, on
    exactly the recorded tokens, sampling as recorded unless --config is given.

    Exit code 0 if every recorded call was reached and none differed, else 1.
    What the harness prints goes to stderr.
    """
    if fork_at is None and (engine or model):
        fail("a replay asks no engine; --fork-at CALL goes on with one")
    if task_dir is not None and not task_dir.is_dir():
        fail(f"--task-dir: {task_dir} is not a directory")
    if out is not None and out.is_dir():
        fail(f"--out takes a file, and {out} is a directory")
    recorded, calls, siblings = _recorded(store, rollout)
    job = _job(recorded, harness, command or [])
    job.env = {**job.env, **pairs(env or [])}
    job.read_only = [*job.read_only, *(path.absolute() for path in read_only or [])]
    # What an engine takes is nobody's guess; without one, a harness that does not end is stuck.
    job.timeout_s = timeout or (None if fork_at else _deadline(recorded))
    job.never_visible = [store, *([out] if out else [])]
    job.stdout = sys.stderr.fileno()
    settings = settings_from(config)
    seen = {call.wire.host: PROVIDER_OF[call.dialect] for call in calls if call.wire.host}
    settings = settings.model_copy(update={"hosts": {**seen, **job.hosts, **settings.hosts}})
    info = EngineInfo("", recorded.model)
    if fork_at is not None:
        fork_at = _call_id(calls, fork_at)
        job.group_id, job.task_id = recorded.group_id, recorded.task_id
        job.sample_index = 1 + max(siblings)
        job.forked_from = f"{recorded.rollout_id}/{fork_at}"
        info = probed(engine or settings.engine, model or settings.engine_model)
        settings = settings.model_copy(update={"keep_reasoning": recorded.keep_reasoning})
        if config is None:
            settings = settings.model_copy(update=_sampling(next(c for c in calls if c.call_id == fork_at)))
        _same_tokenizer(calls, info)
    cut_off = recorded.status in ("timeout", "interrupted")
    playing = Replay(recorded.rollout_id, calls, fork_at=fork_at, cut_off=cut_off)
    with workspace(task_dir) as job.workdir, _written(out or (store if fork_at else None)) as written:
        outcome = loop.run(_run(job, settings, info, written, playing, fast))
    report = playing.report()
    same_end = fork_at is not None or cut_off or outcome.exit_code == recorded.exit_code
    live = _first_live(outcome) if report.forked else None
    faithful = report.faithful and same_end and (live is None or is_exact(live))
    told = {
        **msgspec.to_builtins(report),
        "faithful": faithful,
        "fork": live and {name: getattr(live, name) for name in _FORK},
        "exit_code": outcome.exit_code,
        "recorded_exit_code": recorded.exit_code,
        "run": {**asdict(outcome), "store": outcome.store if out or fork_at else None},
    }
    if json:
        print_json(told)
    else:
        tell_report(report, outcome, recorded, live, faithful)
    raise typer.Exit(0 if faithful else NO)


async def _run(
    job: Job, settings: Settings, info: EngineInfo, store: Path, playing: Replay, fast: bool
) -> Outcome:
    from polar_mitm.cli.hosting import embedded
    from polar_mitm_addons.replay import ServeRecorded

    async with embedded(
        settings, info, store, lambda capture: ServeRecorded(capture, playing, fast=fast)
    ) as host:
        return await run_rollout(job, host)


def _recorded(store: Path, rollout: str) -> tuple[Rollout, list[ModelCall], list[int]]:
    """The rollout, its calls whole, and the sample indices of its group."""
    with reading(store) as reader:
        (found,) = chosen(reader, rollout)
        calls = reader.calls(found.rollout_id, wire=True)
        group = [r for r in reader.rollouts() if found.group_id and r.group_id == found.group_id]
    if not calls:
        fail(f"rollout {found.rollout_id} has no calls: there is nothing to replay")
    if found.incomplete:
        say(f"the record is incomplete, and may not reach its end: {found.incomplete}", style="yellow")
    redacted = sum(b"<redacted:" in call.wire.response_body for call in calls)
    if redacted:
        say(f"{plural(redacted, 'answer')} had secrets, which the record has not", style="yellow")
    return found, calls, [r.sample_index for r in [found, *group]]


def _job(recorded: Rollout, harness: str | None, command: Sequence[str]) -> Job:
    """The recorded command with the recipe's program of today, or any other command."""
    from polar_mitm_sandbox import recipes

    name = harness or recorded.harness
    if not harness and name.partition(":")[0] not in recipes.available():
        return Job(list(command or recorded.command), name=recorded.harness)
    recipe = recipes.load(name)
    if recipe.version != recorded.harness_version:
        was = recorded.harness_version or "an unknown version"
        say(f"recorded with {recorded.harness} {was}, replayed with {recipe.version}", style="yellow")
    installed = install(recipe) if recipe.install.package else None
    program = list(installed.command) if installed else [recipe.install.binary]
    given = list(command or recorded.command)
    names = [Path(each).name for each in given[: len(program)]]
    own = names == [Path(each).name for each in program]
    return job_of(recipe, installed, [*program, *given[len(program) :]] if own else given)


def _deadline(recorded: Rollout) -> float:
    took = (recorded.ended_at or recorded.started_at) - recorded.started_at
    return max(_MIN_TIMEOUT_S, _LATER * took)


def _first_live(outcome: Outcome) -> ModelCall | None:
    """The call that the fork begins with."""
    assert outcome.store is not None
    with reading(outcome.store) as reader:
        calls = reader.calls(outcome.rollout_id, tokens=False)
    return next((call for call in calls if call.replayed_from is None), None)


def _sampling(call: ModelCall) -> dict[str, float | int | None]:
    """The settings that a recorded call was sampled with: a group has one policy."""
    used = call.sampling
    if used.temperature is None:  # it never came to sampling
        return {}
    cap = used.max_tokens if used.max_tokens != call.sampling_requested.max_tokens else None
    return {"temperature": used.temperature, "top_p": used.top_p, "top_k": used.top_k, "max_tokens": cap}


def _same_tokenizer(calls: Sequence[ModelCall], info: EngineInfo) -> None:
    """Recorded ids are text only to the tokenizer that they were sampled with."""
    others = {call.tokenizer for call in calls} - {"", info.tokenizer}
    if others and info.tokenizer:
        fail(f"the engine at {info.url} has another tokenizer than that of the recorded calls", ENGINE)


def _call_id(calls: Sequence[ModelCall], given: str) -> str:
    ids = [call.call_id for call in calls]
    exact = [i for i in ids if i == given]
    found = exact or [i for i in ids if given and (i.startswith(given) or i.endswith(given))]
    if len(found) != 1:
        fail(f"--fork-at: {given!r} is {'no call' if not found else 'several calls'} of this rollout")
    return found[0]


@contextmanager
def _written(store: Path | None) -> Iterator[Path]:
    """Where the fresh run is recorded; nowhere for good unless it is asked for."""
    if store is not None:
        yield store
        return
    with tempfile.TemporaryDirectory(prefix="polar-mitm-replay-") as folder:
        yield Path(folder, "replay.duckdb")
