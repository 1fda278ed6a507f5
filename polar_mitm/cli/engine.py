"""`polar-mitm engine`: an engine of our own, in an environment of its own."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from polar_mitm.cli.output import JsonFlag, fail, print_json, say, step
from polar_mitm.errors import EngineUnfit, SetupError
from polar_mitm.upstream.engine import EngineInfo

app = typer.Typer(no_args_is_help=True, help="Install, start, stop and probe a local vLLM.")

EngineOption = Annotated[
    str | None, typer.Option("--engine", "-e", help="URL of a vLLM; the managed one by default.")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Which of the engine's models; its first.")]


@app.command()
def up(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A Hugging Face folder or name; a small default.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Install vLLM into the cache if need be, start it, and wait until it answers."""
    from polar_mitm import engine

    try:
        state = engine.up(model=model, on_step=say)
    except (SetupError, EngineUnfit) as error:
        fail(str(error))
    _tell(state, json)


@app.command()
def down(json: JsonFlag = False) -> None:
    """Stop the managed engine, all of its processes."""
    from polar_mitm import engine

    stopped = engine.down()
    if json:
        print_json({"stopped": stopped is not None, "engine": stopped})
    else:
        say(f"stopped {stopped.url}" if stopped else "no managed engine was running")


@app.command()
def status(json: JsonFlag = False) -> None:
    """Say whether the managed engine runs, and where. Exit code 1 if it does not."""
    from polar_mitm import engine

    state = engine.status()
    if state is None:
        if json:
            print_json({"running": False})
        else:
            say("no managed engine is running (polar-mitm engine up)")
        raise typer.Exit(1)
    _tell(state, json)


@app.command()
def probe(engine: EngineOption = None, model: ModelOption = "", json: JsonFlag = False) -> None:
    """Check that an engine returns token ids and logprobs while streaming a tool call."""
    info = probed(engine, model)
    if json:
        print_json(info)
        return
    say(f"{info.url}: {info.model}, window {info.max_model_len}, vLLM {info.version or 'of unknown version'}")
    say(
        f"token ids and logprobs: yes; images: {'yes' if info.images else 'no'}; policy {info.policy_version}"
    )


def probed(url: str | None, model: str = "") -> EngineInfo:
    """The engine at `url`, or the managed one, once it has passed the probe; else the command ends."""
    from polar_mitm import engine
    from polar_mitm.upstream.probe import probe as look

    if not url:
        state = engine.status()
        if state is None:
            fail("no engine: start one with `polar-mitm engine up`, or name one with --engine URL")
        url = state.url
    try:
        with step(f"probing the engine at {url}"):
            return asyncio.run(look(url, model))
    except EngineUnfit as error:
        fail(str(error), code=3)


def _tell(state: Any, json: bool) -> None:
    if json:
        print_json({"running": True, "engine": state})
    else:
        say(f"{state.url}  {state.served_model_name}  pid {state.pid}  log {state.log}")
