"""`polar-mitm run`: one harness, or any command, in a sandbox whose only way out is the interceptor."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_mitm.cli import loop
from polar_mitm.cli.engine import EngineOption, ModelOption, probed
from polar_mitm.cli.inspect import StoreOption
from polar_mitm.cli.output import JsonFlag, fail, print_json, say
from polar_mitm.cli.rollout import Job, Outcome, run_rollout
from polar_mitm.cli.settings import ConfigOption, MaxTokensOption, settings_from
from polar_mitm.config import Settings
from polar_mitm.errors import SetupError
from polar_mitm.upstream.engine import EngineInfo

if TYPE_CHECKING:
    from polar_mitm_sandbox.install import InstalledHarness
    from polar_mitm_sandbox.recipes import Recipe


def run(
    store: StoreOption,
    command: Annotated[
        list[str] | None, typer.Argument(help="After --: the command, such as claude -p 'say hi'.")
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(help="A recipe (claude-code, codex, or a .toml file); else told by the command's name."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="With --harness, instead of a command.")] = None,
    engine: EngineOption = None,
    model: ModelOption = "",
    task_dir: Annotated[
        Path | None, typer.Option(help="Becomes /workspace, read-write; a new directory by default.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the command; repeatable.")] = None,
    read_only: Annotated[list[Path] | None, typer.Option(help="Further host path to show.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which everything is killed.")] = None,
    control: Annotated[
        Path | None, typer.Option(help="Use the interceptor behind this socket (polar-mitm up).")
    ] = None,
    group: Annotated[str | None, typer.Option(help="Group id, for rollouts of the same task.")] = None,
    task: Annotated[str | None, typer.Option(help="Task id.")] = None,
    max_tokens: MaxTokensOption = None,
    config: ConfigOption = None,
    json: JsonFlag = False,
) -> None:
    """Run a harness unmodified and record every token that is sampled for it.

    The exit code is the harness's own. What it prints goes to stdout as it is (to stderr with --json). Known
    harnesses are installed at a pinned version, with a placeholder for the key that they ask for; nothing of
    their configuration is changed: no base URL, no proxy.
    """
    workspace = _workspace(task_dir)
    try:
        job = prepare(harness, command or [], prompt, workspace)
    except SetupError as error:
        fail(str(error))
    job.env = {**job.env, **_pairs(env or [])}
    job.read_only = [*job.read_only, *(read_only or [])]
    job.timeout_s, job.group_id, job.task_id, job.quiet = timeout, group, task, json
    job.never_visible = [store.absolute()]
    settings = settings_from(config, max_tokens=max_tokens)
    info = None if control else probed(engine or settings.engine, model or settings.engine_model)
    try:
        outcome = loop.run(_run(job, settings, info, store, control))
    except SetupError as error:
        fail(str(error))
    except (OSError, RuntimeError) as error:
        fail(f"cannot run: {error}")
    except KeyboardInterrupt:
        fail("interrupted; the rollout is recorded as such", code=130)
    tell(outcome, store, workspace, json)
    raise typer.Exit(outcome.exit_code)


async def _run(
    job: Job, settings: Settings, info: EngineInfo | None, store: Path, control: Path | None
) -> Outcome:
    from polar_mitm.cli.hosting import ControlHost, embedded

    if control is not None:
        return await run_rollout(job, ControlHost(control))
    assert info is not None
    async with embedded(settings, info, store) as host:
        return await run_rollout(job, host)


def prepare(harness: str | None, command: Sequence[str], prompt: str | None, workdir: Path) -> Job:
    """A job for a recipe, for a command that a recipe knows, or for any other command.

    Raises:
        SetupError: no such recipe, it cannot be installed, or nothing to run was given.
    """
    from polar_mitm_sandbox import recipes

    recipe = recipes.load(harness) if harness else _recipe_of(command)
    if recipe is None:
        if not command:
            raise SetupError("nothing to run: give a command after --, or --harness NAME --prompt TEXT")
        return Job(list(command), workdir, name=Path(command[0]).name)
    installed = install(recipe)
    if command:
        own = Path(command[0]).name == installed.bin_path.name
        arguments = [*installed.command, *command[1:]] if own else list(command)
    elif prompt is not None:
        arguments = [*installed.command, *recipe.arguments(prompt)]
    else:
        raise SetupError(f"give {recipe.name} something to do: --prompt TEXT, or its own command after --")
    return Job(
        arguments,
        workdir,
        name=recipe.name,
        version=recipe.version,
        env=recipe.env,
        home=recipe.home,
        read_only=list(installed.ro_paths),
        path=installed.path,
    )


def install(recipe: Recipe) -> InstalledHarness:
    """The recipe's harness, from the cache or installed into it.

    Raises:
        SetupError: it cannot be installed here.
    """
    from polar_mitm.cache import default_cache
    from polar_mitm_sandbox.install import ensure_harness

    return ensure_harness(recipe, default_cache(), say)


def _recipe_of(command: Sequence[str]) -> Recipe | None:
    """The recipe whose program the command names, as in `claude -p ...`."""
    from polar_mitm_sandbox import recipes

    known = [recipes.load(name) for name in recipes.available()]
    named = [r for r in known if command and r.install.npm and Path(r.install.binary).name == command[0]]
    return named[0] if named else None


def tell(outcome: Outcome, store: Path, workspace: Path, json: bool) -> None:
    """Print what a rollout came to."""
    if json:
        print_json({**asdict(outcome), "store": store, "workspace": workspace})
        return
    say(
        f"rollout {outcome.rollout_id}  exit {outcome.exit_code}  {outcome.calls} calls  "
        f"{outcome.sampled_tokens} sampled tokens  workspace {workspace}"
    )
    if outcome.refused:
        say(f"refused: {', '.join(outcome.refused)}")
    if outcome.incomplete:
        say(f"[red]the record is incomplete:[/red] {outcome.incomplete}; this rollout is never trained on")


def _workspace(task_dir: Path | None) -> Path:
    if task_dir is None:
        return Path(tempfile.mkdtemp(prefix="polar-mitm-workspace-"))
    if not task_dir.is_dir():
        fail(f"--task-dir: {task_dir} is not a directory")
    return task_dir.absolute()


def _pairs(given: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for each in given:
        name, mark, value = each.partition("=")
        if not mark or not name:
            fail(f"--env takes NAME=VALUE, not {each!r}")
        pairs[name] = value
    return pairs
