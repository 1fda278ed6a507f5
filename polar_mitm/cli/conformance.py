"""`polar-mitm conformance`: real harnesses through scripted scenarios, and a matrix of what came of it."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from polar_mitm.cli import loop
from polar_mitm.cli.demo import check_sandbox
from polar_mitm.cli.exits import NO, SETUP, fail
from polar_mitm.cli.output import JsonFlag, plural, print_json, print_table, say, tell
from polar_mitm.cli.run import install
from polar_mitm.conformance.matrix import COLUMNS, SUMMARY, Matrix, cells, changes, markdown, summary
from polar_mitm.conformance.rows import Row
from polar_mitm.conformance.scenarios import SCENARIOS, Scenario, chosen
from polar_mitm.errors import SetupError

if TYPE_CHECKING:
    from polar_mitm_sandbox.recipes import Recipe

OWN_AGENT = "sdk-agent"
EXAMPLES = (
    "$ polar-mitm conformance --fast\n\n"
    "$ polar-mitm conformance claude-code codex --scenario two-turns --scenario parallel\n\n"
    "$ polar-mitm conformance --markdown CONFORMANCE.md\n\n"
    "$ polar-mitm conformance codex --latest"
)


@dataclass(frozen=True)
class _Run:
    """One harness at one version in one scenario; `source` is where its recipe was loaded from."""

    source: str
    recipe: Recipe
    scenario: Scenario

    @property
    def name(self) -> str:
        return f"{self.recipe.name} {self.recipe.version} {self.scenario.name}"


def conformance(
    harnesses: Annotated[
        list[str] | None,
        typer.Argument(metavar="[HARNESS...]", help="Recipes, as NAME, NAME:VARIANT or a .toml; else all."),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option("--scenario", metavar="NAME", help=f"Repeatable: {', '.join(SCENARIOS)}. Else all."),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Only the scenarios that take seconds, for CI.")
    ] = False,
    latest: Annotated[
        bool, typer.Option("--latest", help="Run the newest version too, and say what is different in it.")
    ] = False,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the matrix there, as Markdown.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where each run's store, output and workspace go; else a new one."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, metavar="N", help="Runs at once; else one per core.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Prove that harnesses work here, version by version.

    Installs each harness at its pinned version and runs it, unmodified and in
    its sandbox, against a scripted engine: tools in parallel, tool calls that
    make no sense, faults of the engine, a slow one, pictures, sub-agents, a
    nearly full window, a resumed conversation, one way of trusting the CA at a
    time. Exit code 1 if a scenario fails, or a harness cannot be installed.
    """
    sources = _recipes(harnesses or [])
    scenarios = _scenarios(scenario or [], fast)
    if markdown_file is not None and not markdown_file.absolute().parent.is_dir():
        fail(f"--markdown: there is no directory {markdown_file.absolute().parent}")
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        fail(f"--out takes a new or empty directory, and {out} is none")
    check_sandbox()
    folder = (out or Path(tempfile.mkdtemp(prefix="polar-mitm-conformance-"))).absolute()
    matrix = Matrix()
    versions = {source: _installed(recipe, latest, matrix) for source, recipe in sources.items()}
    if not any(versions.values()):
        fail(f"nothing to run: {'; '.join(matrix.unavailable.values())}", SETUP)
    runs = [_Run(s, recipe, each) for s, found in versions.items() for recipe in found for each in scenarios]
    say(f"{plural(len(runs), 'run')}, each with its store and output below {folder}")
    matrix.rows = loop.run(_run_all(runs, folder, jobs or os.cpu_count() or 1))
    for pinned, newest in (each for each in versions.values() if len(each) == 2):
        old, new = (matrix.of(each.name, each.version) for each in (pinned, newest))
        matrix.changes[f"{pinned.name} {pinned.version} -> {newest.version}"] = changes(old, new)
    if markdown_file is not None:
        markdown_file.write_text(markdown(matrix))
    if json:
        print_json({**msgspec.to_builtins(matrix), "ok": matrix.failures == 0, "folder": folder})
    else:
        _tell(matrix)
    if matrix.failures:
        say(f"{plural(matrix.failures, 'failure')}: each run's output is below {folder}", style="red")
        raise typer.Exit(NO)


def _recipes(names: Sequence[str]) -> dict[str, Recipe]:
    """The recipes of these names, or all but our own agent's."""
    from polar_mitm_sandbox import recipes

    every = [name for name in recipes.available() if name != OWN_AGENT]
    try:
        return {name: recipes.load(name) for name in names or every}
    except SetupError as error:
        fail(str(error))


def _scenarios(names: Sequence[str], fast: bool) -> list[Scenario]:
    if names and fast:
        fail("either --scenario NAME or --fast, not both")
    try:
        return chosen(names, fast)
    except KeyError as error:
        fail(f"there is no scenario {error}: there are {', '.join(SCENARIOS)}")


def _installed(recipe: Recipe, latest: bool, matrix: Matrix) -> list[Recipe]:
    """The recipe and, with `latest`, the same at its newest version, once they are installed."""
    try:
        if recipe.install.package:
            install(recipe)
    except SetupError as error:
        matrix.unavailable[recipe.name] = str(error)
        say(f"{recipe.name} cannot be installed here: {str(error).splitlines()[0]}", style="yellow")
        return []
    newest = _newest(recipe, matrix) if latest else None
    return [recipe, newest] if newest else [recipe]


def _newest(recipe: Recipe, matrix: Matrix) -> Recipe | None:
    """The recipe at its newest version; None where that is the pinned one, or cannot be had."""
    from polar_mitm.cache import default_cache
    from polar_mitm_sandbox.latest import newest_version

    what = f"{recipe.name} {recipe.version} -> newest"
    try:
        version = newest_version(recipe, default_cache())
        if version == recipe.version:
            matrix.changes[what] = ["it is the newest"]
            return None
        what = f"{recipe.name} {recipe.version} -> {version}"
        newest = replace(recipe, version=version)
        install(newest)
    except SetupError as error:
        first, *others = str(error).splitlines()
        why = " ".join([first, *others[-1:]])  # of a log, its end
        matrix.changes[what] = [f"it cannot be had: {why}"]
        say(f"{what}: {why}", style="yellow")
        return None
    return newest


async def _run_all(runs: Sequence[_Run], folder: Path, jobs: int) -> list[Row]:
    """The rows, in the order of `runs`. The longest begin first, so that none is waited for alone."""
    gate = asyncio.Semaphore(jobs)

    async def one(run: _Run) -> Row:
        async with gate:
            row = await _run_one(run, folder)
        why = f": {'; '.join(row.reasons)}" if row.reasons else ""
        say(f"{run.name}: {row.outcome} in {row.seconds:.0f} s{why}", style="red" if row.failed else "")
        return row

    rows: dict[int, asyncio.Task[Row]] = {}
    async with asyncio.TaskGroup() as group:
        for n in sorted(range(len(runs)), key=lambda n: -runs[n].scenario.timeout_s):
            rows[n] = group.create_task(one(runs[n]))
    return [rows[n].result() for n in range(len(runs))]


async def _run_one(run: _Run, folder: Path) -> Row:
    """A run in a process of its own. If that fails, so has the run."""
    from polar_mitm.cli.conformance_run import ROW

    recipe, scenario = run.recipe, run.scenario
    own = folder / f"{recipe.name}-{recipe.version}".replace("/", "_") / scenario.name
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "polar_mitm.cli.conformance_run"),
        *(run.source, recipe.version, scenario.name, str(own)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for us, who then end it in good order
    )
    try:
        _, told = await process.communicate()
    except asyncio.CancelledError:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        raise
    if process.returncode == 0:
        return msgspec.json.decode((own / ROW).read_bytes(), type=Row)
    lines = told.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
    return Row(recipe.name, recipe.version, scenario.name, "fail", [f"it could not be run: {lines[-1]}"])


def _tell(matrix: Matrix) -> None:
    print_table(COLUMNS, [cells(row) for row in matrix.rows])
    tell()
    summaries = [summary(*each, matrix.of(*each)) for each in matrix.versions()]
    print_table(SUMMARY, [msgspec.structs.astuple(each) for each in summaries])
    for what, found in matrix.changes.items():
        tell(f"\n{what}", style="bold")
        for change in found or ["no difference"]:
            tell(f"  {change}")
    for name, why in matrix.unavailable.items():
        tell(f"\n{name} could not be run: {why}")
