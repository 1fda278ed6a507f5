"""`polar-mitm demo`: two unmodified harnesses, a real engine, one database, from nothing."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from polar_mitm.cli import loop
from polar_mitm.cli.doctor import install_bubblewrap
from polar_mitm.cli.engine import EngineOption, ModelOption, probed
from polar_mitm.cli.inspect import calls as list_calls
from polar_mitm.cli.inspect import reading
from polar_mitm.cli.output import JsonFlag, fail, print_json, print_table, say
from polar_mitm.cli.rollout import Job, Outcome, run_rollout
from polar_mitm.cli.run import prepare
from polar_mitm.cli.settings import settings_from
from polar_mitm.errors import EngineUnfit, SetupError
from polar_mitm.types import ModelCall
from polar_mitm.upstream.engine import EngineInfo

PROMPT = (
    'Create a file hello.txt that contains "hi" in the current directory with the shell tool, then say done.'
)
HARNESSES = ("claude-code", "codex")


def demo(
    store: Annotated[Path | None, typer.Option("--store", "-s", help="The DuckDB file to write.")] = None,
    engine: EngineOption = None,
    model: ModelOption = "",
    max_tokens: Annotated[int, typer.Option(help="Cap on sampled tokens per call.")] = 96,
    timeout: Annotated[float, typer.Option(help="Seconds per harness.")] = 600,
    keep_engine: Annotated[bool, typer.Option("--keep-engine", help="Leave the engine running.")] = False,
    json: JsonFlag = False,
) -> None:
    """Set up what can be set up, run Claude Code and Codex on a small task, and show what was recorded.

    The default model is tiny: it does not solve the task. What the demo shows is that two programs that know
    nothing of us are answered by a local engine, and that every token sampled for them is accounted for.
    """
    if problem := install_bubblewrap():
        fail(problem)
    path = store or Path(tempfile.mkdtemp(prefix="polar-mitm-demo-")) / "demo.duckdb"
    started = engine is None and _start_engine(model)
    try:
        info = probed(engine, "" if started else model)
        jobs = _jobs(timeout, json)
        for job in jobs:
            job.never_visible = [path.absolute()]
        say(f"running {', '.join(f'{j.name} {j.version}' for j in jobs)} in sandboxes without network")
        outcomes = loop.run(_run(jobs, info, path, max_tokens))
    except SetupError as error:
        fail(str(error))
    finally:
        if started and not keep_engine:
            _stop_engine()
    _report(path, info, outcomes, json)
    if not all(o.calls for o in outcomes):
        fail("a harness made no model call; `polar-mitm doctor` may say why", code=1)


def _start_engine(model: str) -> bool:
    """Start the managed engine where none runs; whether it was us who did."""
    from polar_mitm import engine

    if engine.status() is not None:
        return False
    try:
        engine.up(model=model or None, on_step=say)
    except (SetupError, EngineUnfit) as error:
        fail(str(error))
    return True


def _stop_engine() -> None:
    from polar_mitm import engine

    say("stopping the engine (--keep-engine leaves it running)")
    engine.down()


def _jobs(timeout: float, json: bool) -> list[Job]:
    jobs = []
    for name in HARNESSES:
        try:
            jobs.append(_job(name))
        except SetupError as error:
            say(f"[yellow]{name} cannot be installed here:[/yellow] {error}")
    if not jobs:
        say("no harness can be installed: running our own small agent on the official Anthropic SDK instead")
        jobs.append(_job("sdk-agent"))
    for job in jobs:
        job.timeout_s, job.quiet = timeout, json
    return jobs


def _job(name: str) -> Job:
    return prepare(name, [], PROMPT, Path(tempfile.mkdtemp(prefix=f"polar-mitm-{name}-")))


async def _run(jobs: list[Job], info: EngineInfo, store: Path, max_tokens: int) -> list[Outcome]:
    from polar_mitm.cli.hosting import embedded

    outcomes = []
    async with embedded(settings_from(None, max_tokens=max_tokens), info, store) as host:
        for job in jobs:
            say(f"--- {job.name} {job.version}")
            outcomes.append(await run_rollout(job, host))
    return outcomes


def _report(store: Path, info: EngineInfo, outcomes: list[Outcome], json: bool) -> None:
    from polar_mitm.reconstruct import build

    with reading(store) as reader:
        found: list[ModelCall] = reader.calls()
        built = [build(reader.calls(r.rollout_id), rollout=r) for r in reader.rollouts()]
    reports = [report for _, report in built]
    accounting = {
        "sampled": sum(r.sampled for r in reports),
        "trained": sum(r.trained for r in reports),
        "masked": sum(r.num_masked for r in reports),
        "quarantined": sum(r.num_quarantined for r in reports),
    }
    if json:
        print_json(
            {
                "engine": {"url": info.url, "model": info.model, "version": info.version},
                "harnesses": [_harness(o) for o in outcomes],
                "accounting": accounting,
                "store": store,
            }
        )
        return
    list_calls(store)
    rows = [
        (o.name, o.version, o.exit_code, o.calls, o.sampled_tokens, _rate(found, o), ", ".join(o.refused))
        for o in outcomes
    ]
    print_table("harnesses", "harness version exit calls sampled tok/s refused", rows)
    num_trajectories = sum(len(trajectories) for trajectories, _ in built)
    print_table(
        f"reconstruction: {num_trajectories} trajectories",
        "sampled trained masked quarantined",
        [tuple(accounting.values())],
    )
    say(f"database: {store}   (polar-mitm show CALL --store {store})")


def _harness(outcome: Outcome) -> dict[str, Any]:
    keys = ("name", "version", "exit_code", "calls", "sampled_tokens", "refused", "rollout_id", "incomplete")
    whole = asdict(outcome)
    return {key: whole[key] for key in keys}


def _rate(calls: list[ModelCall], outcome: Outcome) -> float | None:
    """Sampled tokens per second of generation, over the calls of a rollout."""
    own = [c for c in calls if c.rollout_id == outcome.rollout_id and c.first_token_at and c.ended_at]
    seconds = sum((c.ended_at or 0) - (c.first_token_at or 0) for c in own)
    return round(sum(len(c.completion_token_ids) for c in own) / seconds, 1) if seconds > 0 else None
