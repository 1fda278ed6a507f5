"""One run of a conformance scenario, in a process of its own: mitmproxy has room for one interceptor in each.

    python -m polar_mitm.cli.conformance_run HARNESS VERSION SCENARIO FOLDER

leaves `row.json` in FOLDER, beside the store, the workspace and what the harness printed.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from polar_mitm import config
from polar_mitm.cli import loop
from polar_mitm.cli.hosting import embedded
from polar_mitm.cli.rollout import Job, run_rollout
from polar_mitm.cli.run import install, job_of
from polar_mitm.conformance.rows import Row, row_of
from polar_mitm.conformance.scenarios import SCENARIOS, Ran, Scenario
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.errors import SetupError
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from polar_mitm.upstream.probe import probe

if TYPE_CHECKING:
    from polar_mitm_sandbox.recipes import Recipe

ROW, STORE, OUTPUT, WORKSPACE = "row.json", "run.duckdb", "output.txt", "workspace"
_MAX_FILE_BYTES = 1 << 20


async def run_scenario(recipe: Recipe, scenario: Scenario, folder: Path) -> Row:
    """Run a harness through a scenario, and judge it. What it leaves is in `folder`.

    Raises:
        SetupError: it cannot be installed, or no sandbox can be made.
    """
    workspace = folder / WORKSPACE
    workspace.mkdir(parents=True)
    if len(scenario.prompts) > 1 and not recipe.resume_argv:
        why = "its recipe does not say how a conversation is resumed ([run] resume_argv)"
        return Row(recipe.name, recipe.version, scenario.name, "n/a", [why])
    store = folder / STORE
    for name, content in scenario.files.items():
        (workspace / name).write_bytes(content)
    job, play = _job(recipe, scenario), scenario.play()
    job.workdir, job.never_visible = workspace, [store]
    job.timeout_s, job.trust = scenario.timeout_s, scenario.trust
    async with ScriptedEngine(images=scenario.images) as engine:
        info = await probe(engine.url)
        engine.calls.clear()
        engine.script = play
        settings = config.load(engine=engine.url, retry_after_s=1, hosts=dict(recipe.hosts))
        with (folder / OUTPUT).open("wb") as output:
            job.stdout = job.stderr = output.fileno()
            async with embedded(settings, info, store) as host:
                outcome = await run_rollout(job, host)
    with open_reader(store) as reader:
        (rollout,) = reader.rollouts()
        calls, events = reader.calls(wire=True), reader.egress()
    _, report = build(calls, rollout=rollout)
    ran = Ran(
        exit_code=outcome.exit_code,
        output=(folder / OUTPUT).read_text(errors="replace"),
        seconds=outcome.seconds,
        calls=calls,
        events=events,
        asked=[call.request for call in engine.calls],
        files=_files(workspace),
        play=play,
        incomplete=rollout.incomplete,
        accounted=report.adds_up,
    )
    return row_of(recipe.name, recipe.version, scenario, ran)


def _job(recipe: Recipe, scenario: Scenario) -> Job:
    """The harness on the first prompt, and for each further one a process that resumes, in one sandbox."""
    installed = install(recipe) if recipe.install.package else None
    program = installed.command if installed else (recipe.install.binary,)
    first, *others = (
        [*program, *recipe.arguments(prompt, resume=n > 0)] for n, prompt in enumerate(scenario.prompts)
    )
    job = job_of(recipe, installed, first)
    if others:
        job.command = ["sh", "-c", " && ".join(map(shlex.join, (first, *others)))]
    return job


def _files(workspace: Path) -> dict[str, str]:
    """The workspace's small files. It is the harness's: no link is followed."""
    found = {}
    for path in workspace.iterdir():
        if not path.is_symlink() and path.is_file() and path.stat().st_size <= _MAX_FILE_BYTES:
            found[path.name] = path.read_text(errors="replace")
    return found


def main(harness: str, version: str, scenario: str, folder: Path) -> None:
    """Leave `row.json` in `folder`; exit code 4 and a sentence where this machine lacks something."""
    from polar_mitm_sandbox import recipes

    recipe = replace(recipes.load(harness), version=version)
    try:
        row = loop.run(run_scenario(recipe, SCENARIOS[scenario], folder))
    except SetupError as error:
        print(error, file=sys.stderr)
        raise SystemExit(4) from error
    (folder / ROW).write_bytes(msgspec.json.encode(row))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
