"""`polar-mitm run`: one harness, or any command, in a sandbox whose only way out is the interceptor."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_mitm.cli import loop
from polar_mitm.cli.engine import EngineOption, ModelOption, probed
from polar_mitm.cli.exits import fail
from polar_mitm.cli.output import JsonFlag, plural, print_json, progress, say
from polar_mitm.cli.rollout import Job, Outcome, run_rollout
from polar_mitm.cli.settings import ConfigOption, MaxTokensOption, settings_from
from polar_mitm.config import Settings
from polar_mitm.upstream.engine import EngineInfo

if TYPE_CHECKING:
    from polar_mitm_sandbox.install import InstalledHarness
    from polar_mitm_sandbox.recipes import Recipe

EXAMPLES = (
    "$ polar-mitm run -s runs.duckdb -- claude -p 'fix the failing test'\n\n"
    "$ polar-mitm run -s runs.duckdb --harness codex --prompt 'fix the test'\n\n"
    "$ polar-mitm run -s runs.duckdb --engine http://gpu-box:8000 -- ./my-agent\n\n"
    "$ polar-mitm run --control runs.duckdb.sock -- claude -p 'hi'"
)


def run(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="What to run, such as claude -p 'say hi'."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", "-s", metavar="FILE", help="DuckDB file to record into; made where missing."),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="claude-code, codex:login, qwen-code, a .toml, ...; else by the command.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The task, with --harness and no command.")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Becomes /workspace, read-write; else a new directory.")
    ] = None,
    engine: EngineOption = None,
    model: ModelOption = "",
    max_tokens: MaxTokensOption = None,
    config: ConfigOption = None,
    control: Annotated[
        Path | None,
        typer.Option(metavar="SOCKET", help="Use the interceptor of `polar-mitm up`: its store and engine."),
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
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Give the command our standard input; else it reads nothing.")
    ] = False,
    group: Annotated[str | None, typer.Option(metavar="ID", help="Of the rollouts of one task.")] = None,
    task: Annotated[str | None, typer.Option(metavar="ID", help="Of the task.")] = None,
    json: JsonFlag = False,
) -> None:
    """Run a harness unmodified, recording every sampled token.

    Known harnesses are installed at a pinned version, with a placeholder for
    the key that they ask for. Nothing of their configuration is changed: no
    base URL, no proxy. Any other command runs as it is. A recipe's hosts are
    served beside the known ones; with --control those of the interceptor's
    own settings are.

    The exit code is the harness's own; 124 after --timeout, 125 if polar-mitm
    itself failed. What the harness prints goes to stdout as it is (to stderr
    with --json).
    """
    if control is not None and (store or engine or model or max_tokens or config):
        fail("--control stands alone: store, engine and settings are those of the `polar-mitm up` behind it")
    if control is None and store is None:
        fail("say where to record: --store FILE, or --control SOCKET of a `polar-mitm up`")
    if store is not None and store.is_dir():
        fail(f"--store takes a file, and {store} is a directory")
    if task_dir is not None and not task_dir.is_dir():
        fail(f"--task-dir: {task_dir} is not a directory")
    job = prepare(harness, command or [], prompt)
    job.env = {**job.env, **pairs(env or [])}
    job.read_only = [*job.read_only, *(path.absolute() for path in read_only or [])]
    job.timeout_s, job.group_id, job.task_id = timeout, group, task
    # Not by default: Codex reads a stdin that is no terminal to its end before it starts.
    job.stdin = sys.stdin.fileno() if stdin and sys.stdin else None
    job.stdout = sys.stderr.fileno() if json else None
    if store is not None:
        _hint(store.absolute())
    settings = settings_from(config, max_tokens=max_tokens)
    settings = settings.model_copy(update={"hosts": {**job.hosts, **settings.hosts}})
    info = None if control else probed(engine or settings.engine, model or settings.engine_model)
    with workspace(task_dir) as job.workdir:
        outcome = loop.run(_run(job, settings, info, store, control))
    tell_outcome(outcome, job.workdir if job.workdir.exists() else None, json)
    raise typer.Exit(outcome.exit_code)


async def _run(
    job: Job, settings: Settings, info: EngineInfo | None, store: Path | None, control: Path | None
) -> Outcome:
    from polar_mitm.cli.hosting import ControlHost, embedded

    if info is None or store is None:
        assert control is not None
        job.never_visible = [control]
        return await run_rollout(job, ControlHost(control))
    job.never_visible = [store]
    async with embedded(settings, info, store) as host:
        return await run_rollout(job, host)


def prepare(harness: str | None, command: Sequence[str], prompt: str | None) -> Job:
    """A job for a recipe, for a command that a recipe knows, or for any other command.

    Raises:
        SetupError: no such recipe, or it cannot be installed.
    """
    from polar_mitm_sandbox import recipes

    if not command and not harness:
        fail("nothing to run: give a command after --, or --harness NAME --prompt TEXT")
    recipe = recipes.load(harness) if harness else _recipe_of(command)
    if recipe is None:
        if prompt is not None:
            fail("--prompt is for --harness NAME; a command of your own takes its prompt after --")
        return Job(list(command), name=Path(command[0]).name)
    if command and prompt is not None:
        fail("either --prompt TEXT or a command after --, not both")
    if not command and prompt is None:
        fail(f"give {recipe.name} something to do: --prompt TEXT, or its own command after --")
    installed = install(recipe) if recipe.install.package else None
    program = installed.command if installed else (recipe.install.binary,)
    if prompt is not None:
        arguments = [*program, *recipe.arguments(prompt)]
    else:
        own = Path(command[0]).name == Path(program[0]).name
        arguments = [*program, *command[1:]] if own else list(command)
    return job_of(recipe, installed, arguments)


def job_of(recipe: Recipe, installed: InstalledHarness | None, arguments: list[str]) -> Job:
    """A command in the surroundings that its recipe describes."""
    return Job(
        arguments,
        name=recipe.name,
        version=recipe.version,
        env=recipe.env,
        home=recipe.home,
        read_only=list(installed.ro_paths) if installed else [],
        path=installed.path if installed else (),
        hosts=recipe.hosts,
    )


def install(recipe: Recipe) -> InstalledHarness:
    """The harness of a recipe with a package, from the cache or installed into it.

    Raises:
        SetupError: it cannot be installed here.
    """
    from polar_mitm.cache import default_cache
    from polar_mitm_sandbox.install import ensure_harness, is_installed

    if is_installed(recipe, default_cache()):
        return ensure_harness(recipe, default_cache(), say)
    with progress() as step:
        return ensure_harness(recipe, default_cache(), step)


def _recipe_of(command: Sequence[str]) -> Recipe | None:
    """The recipe whose program the command names, as in `claude -p ...`."""
    from polar_mitm_sandbox import recipes

    known = [recipes.load(name) for name in recipes.available()]
    named = [r for r in known if command and r.install.npm and Path(r.install.binary).name == command[0]]
    return named[0] if named else None


def tell_outcome(outcome: Outcome, workspace: Path | None, json: bool) -> None:
    """Print what a rollout came to."""
    if json:
        print_json({**asdict(outcome), "workspace": workspace})
        return
    say(
        f"rollout {outcome.rollout_id}  {outcome.status}  exit {outcome.exit_code}  "
        f"{plural(outcome.calls, 'call')}  {plural(outcome.sampled_tokens, 'sampled token')}  "
        f"{outcome.seconds:.1f} s"
    )
    say(f"store {outcome.store or 'of the interceptor'}  workspace {workspace or 'left empty, and removed'}")
    if outcome.refused:
        say(f"refused: {', '.join(outcome.refused)}")
    if outcome.incomplete:
        say(f"the record is incomplete, and never trained on: {outcome.incomplete}", style="red")


@contextmanager
def workspace(task_dir: Path | None) -> Iterator[Path]:
    """The task's directory, or a new one, which goes if nothing is left in it."""
    if task_dir is not None:
        yield task_dir.absolute()
        return
    new = Path(tempfile.mkdtemp(prefix="polar-mitm-workspace-"))
    try:
        yield new
    finally:
        with suppress(OSError):
            new.rmdir()


def _hint(store: Path) -> None:
    """A store has one writer: the recorder will go elsewhere, and here is what to do instead."""
    from polar_mitm.store.share import find_live

    if live := find_live(store):
        say(
            f"process {live.pid} records into {store}: --control SOCKET joins a `polar-mitm up`",
            style="yellow",
        )


def pairs(given: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for each in given:
        name, mark, value = each.partition("=")
        if not mark or not name:
            fail(f"--env takes NAME=VALUE, not {each!r}")
        pairs[name] = value
    return pairs
