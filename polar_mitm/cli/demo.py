"""`polar-mitm demo`: unmodified harnesses, a real engine, one database, from nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from polar_mitm.cli import loop
from polar_mitm.cli.demo_report import Demo, Ran, tell_demo
from polar_mitm.cli.doctor import install_bubblewrap
from polar_mitm.cli.engine import MANAGED, EngineOption, ModelOption, probed
from polar_mitm.cli.exits import NO, SETUP, fail
from polar_mitm.cli.output import JsonFlag, plural, progress, say
from polar_mitm.cli.rollout import Job, run_rollout
from polar_mitm.cli.run import prepare
from polar_mitm.cli.settings import settings_from
from polar_mitm.errors import EngineUnfit, SetupError
from polar_mitm.upstream.engine import EngineInfo

PROMPT = (
    'Create a file hello.txt that contains "hi" in the current directory with the shell tool, then say done.'
)
HARNESSES = ("claude-code", "codex")
OWN_AGENT = "sdk-agent"
EXAMPLES = (
    "$ polar-mitm demo\n\n"
    "$ polar-mitm demo --engine http://gpu-box:8000 --max-tokens 1024\n\n"
    "$ polar-mitm demo --harness pi --harness opencode"
)


def demo(
    store: Annotated[
        Path | None,
        typer.Option("--store", "-s", metavar="FILE", help="DuckDB file to write; else a new one."),
    ] = None,
    engine: EngineOption = None,
    model: ModelOption = "",
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What to run; repeatable. Else claude-code and codex."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Cap on sampled tokens per call.")
    ] = 1024,
    timeout: Annotated[float, typer.Option(min=1, metavar="S", help="Seconds per harness.")] = 600,
    keep_engine: Annotated[bool, typer.Option("--keep-engine", help="Leave the engine running.")] = False,
    json: JsonFlag = False,
) -> None:
    """From nothing: two harnesses, an engine, a database.

    Sets up what can be set up, runs Claude Code and Codex (or what --harness
    names) on a small task, and shows what was recorded. The default model is
    tiny, and does not solve the task. What the demo shows is that programs that
    know nothing of us are answered by a local engine, and that every token
    sampled for them is accounted for.

    Where none can be installed, a small agent of ours takes their place.
    """
    if store is not None and store.is_dir():
        fail(f"--store takes a file, and {store} is a directory")
    _check_names(harness or [])
    say("1. the sandbox: a network namespace with nothing but our listeners in it", style="bold")
    check_sandbox()
    say("2. the harnesses, unmodified, at pinned versions", style="bold")
    jobs, unavailable = _jobs(harness or HARNESSES, timeout)
    say("3. the engine", style="bold")
    with _engine(engine, model, keep_engine) as (url, name):
        info = probed(url, name)
        say(f"{info.model} on vLLM {info.version} at {info.url} returns token ids and logprobs")
        say("4. the task, in each of them", style="bold")
        folder = Path(tempfile.mkdtemp(prefix="polar-mitm-demo-"))
        path = (store or folder / "demo.duckdb").absolute()
        ran, recorded = loop.run(_run(jobs, folder, info, path, max_tokens))
    if not tell_demo(Demo(info, recorded, ran, unavailable), json):
        say("a harness was not answered: its calls, and the end of its output, say why", style="red")
        raise typer.Exit(NO)


def _check_names(harnesses: Sequence[str]) -> None:
    from polar_mitm_sandbox import recipes

    known = recipes.available()
    if unknown := {name for name in harnesses if name.partition(":")[0] not in known}:
        fail(f"--harness takes one of {', '.join(known)}, not {', '.join(sorted(unknown))}")


def check_sandbox() -> None:
    """Get bubblewrap where that is possible; the end of the command where no sandbox can be made.

    Without sandbox there is no demo: a harness that could reach its real provider would prove nothing.
    """
    from polar_mitm.cache import default_cache
    from polar_mitm_sandbox.doctor import doctor

    if problem := install_bubblewrap():
        fail(problem, SETUP)
    for check in doctor(default_cache()):
        if check.required and not check.ok:
            fail(f"no sandbox can be made here: {check.name}: {check.detail}: {check.fix}", SETUP)


def _jobs(harnesses: Sequence[str], timeout: float) -> tuple[list[Job], dict[str, str]]:
    """What of `harnesses` can be run here, and why the rest cannot."""
    jobs: list[Job] = []
    unavailable: dict[str, str] = {}

    def add(name: str) -> None:
        try:
            job = prepare(name, [], PROMPT)
        except SetupError as error:
            unavailable[name] = str(error)
            say(f"{name} cannot be installed here: {str(error).splitlines()[0]}", style="yellow")
            return
        job.timeout_s = timeout
        say(f"{job.name} {job.version}")
        jobs.append(job)

    for name in dict.fromkeys(harnesses):
        add(name)
    if not jobs:
        say("our own small agent on Anthropic's SDK takes their place: it is intercepted in the same way")
        add(OWN_AGENT)
    if not jobs:
        fail(
            "nothing to run: neither the harnesses nor our own agent can be installed (is there a network?)",
            SETUP,
        )
    return jobs, unavailable


@contextmanager
def _engine(url: str | None, model: str, keep: bool) -> Iterator[tuple[str | None, str]]:
    """Which engine and model to ask for: the one that is named, or runs already, or a new one."""
    from polar_mitm import engine

    if url not in (None, MANAGED) or engine.status() is not None:
        yield url, model
        return
    try:
        with progress() as step:
            engine.up(model=model or None, on_step=step)
    except (SetupError, EngineUnfit) as error:
        say("no engine can be set up here; --engine URL takes a vLLM that runs elsewhere", style="yellow")
        raise error
    try:
        yield None, ""
    finally:
        if keep:
            say("the engine stays: polar-mitm engine down stops it")
        else:
            say("stopping the engine (--keep-engine leaves it running)")
            engine.down()


async def _run(
    jobs: list[Job], folder: Path, info: EngineInfo, store: Path, max_tokens: int
) -> tuple[list[Ran], Path]:
    """Run them one after the other, each in a directory of its own; says where it was recorded, too."""
    from polar_mitm.cli.hosting import counting, embedded

    ran = []
    async with embedded(settings_from(None, max_tokens=max_tokens), info, store) as host:
        for job in jobs:
            job.never_visible, job.workdir, log = [store], folder / job.name, folder / f"{job.name}.log"
            job.workdir.mkdir()
            named = f"{job.name} {job.version}"
            with log.open("wb") as output:
                job.stdout = job.stderr = output.fileno()
                async with counting(host, f"{named} is at work", partial(str, named)):
                    outcome = await run_rollout(job, host)
            seen = f"{plural(outcome.calls, 'call')}, {plural(outcome.sampled_tokens, 'sampled token')}"
            say(f"{job.name}: {seen}, exit {outcome.exit_code}, {outcome.seconds:.0f} s")
            ran.append(Ran(outcome, log, (job.workdir / "hello.txt").is_file()))
        return ran, host.store
