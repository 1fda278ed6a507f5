"""`polar-mitm engine`: an engine of our own, in an environment of its own."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from polar_mitm.cli import loop
from polar_mitm.cli.exits import ENGINE, NO, fail
from polar_mitm.cli.output import JsonFlag, print_json, progress, tell
from polar_mitm.upstream.engine import EngineInfo

app = typer.Typer(no_args_is_help=True, help="Install, start, stop and probe a local vLLM.")

EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine", "-e", metavar="URL", help="A vLLM, as http://host:8000; else our own, also `managed`."
    ),
]
MANAGED = "managed"
"""What people may write for the engine that `polar-mitm engine up` started."""
ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="Which of the engine's models; else its first.")
]


@app.command(
    epilog="$ polar-mitm engine up\n\n$ polar-mitm engine up --model ./Qwen3-0.6B --max-model-len 32768"
)
def up(
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTION", help="Further options for vLLM.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="A Hugging Face folder or name; a small default."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Window in tokens; else the model's, as it fits.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="float32, bfloat16, ...; else what suits the device.")
    ] = None,
    tool_call_parser: Annotated[
        str, typer.Option(metavar="NAME", help="vLLM's parser for how this model writes tool calls.")
    ] = "hermes",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="N", help="On 127.0.0.1; else any free one.")
    ] = None,
    dev: Annotated[
        bool, typer.Option("--dev", help="Open vLLM's endpoints that change weights, for training.")
    ] = False,
    lora: Annotated[
        int,
        typer.Option(
            min=0, max=512, metavar="RANK", help="Take LoRA adapters up to this rank; implies --dev."
        ),
    ] = 0,
    transfer: Annotated[
        bool,
        typer.Option(
            "--transfer",
            help="Take weights out of a trainer's GPU memory; implies --dev. "
            "Who reaches the port can then run code as you.",
        ),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Install vLLM if need be, start it, wait until it answers.

    One managed engine runs at a time, from an environment of its own in the
    cache. It stays until `polar-mitm engine down`; `run`, `up` and `demo` find
    it by themselves. What follows -- is for vLLM.
    """
    from polar_mitm import engine

    with progress() as step:
        state = engine.up(
            model=model,
            dtype=dtype,
            max_model_len=max_model_len,
            tool_call_parser=tool_call_parser,
            dev=dev,
            lora=lora,
            transfer=transfer,
            port=port,
            extra=extra or [],
            on_step=step,
        )
    _tell(state, True, json)


@app.command()
def down(json: JsonFlag = False) -> None:
    """Stop the managed engine, all of its processes."""
    from polar_mitm import engine

    stopped = engine.down()
    if json:
        print_json({"stopped": stopped is not None, "engine": stopped})
    else:
        tell(f"stopped {stopped.url}" if stopped else "no managed engine was running")


@app.command()
def status(json: JsonFlag = False) -> None:
    """Say whether the managed engine runs, and where.

    Exit code 1 if it does not.
    """
    from polar_mitm import engine

    state = engine.status()
    if state is not None:
        _tell(state, engine.healthy(state.url), json)
        return
    if json:
        print_json({"running": False, "answers": False, "engine": None})
    else:
        tell("no managed engine is running: polar-mitm engine up")
    raise typer.Exit(NO)


@app.command(epilog="$ polar-mitm engine probe --engine http://gpu-box:8000")
def probe(engine: EngineOption = None, model: ModelOption = "", json: JsonFlag = False) -> None:
    """Check that an engine returns token ids and logprobs.

    While streaming, with a tool on offer. `run`, `up` and `demo` do this first
    and refuse an engine that fails it. Exit code 3 if it does.
    """
    info = probed(engine, model)
    if json:
        print_json(info)
        return
    tell(
        f"{info.url}: {info.model}, window {info.max_model_len}, vLLM {info.version or 'of unknown version'}"
    )
    images = "yes" if info.images else "no"
    tell(f"token ids and logprobs: yes; images: {images}; policy {info.policy_version}")
    if info.weight_version:
        tell(f"weights: {info.weight_version}, and can be updated (development mode)")
    else:
        tell("weights: cannot be updated (polar-mitm engine up --dev)")


def probed(url: str | None, model: str = "") -> EngineInfo:
    """The engine at `url`, or the managed one where it is empty or says so, once it has passed the probe.

    Raises:
        EngineUnfit: it has not; the message says why.
    """
    from polar_mitm import engine
    from polar_mitm.upstream.probe import probe as look

    if not url or url == MANAGED:
        state = engine.status()
        if state is None:
            fail("no engine: start one with `polar-mitm engine up`, or name one with --engine URL", ENGINE)
        url = state.url
    url = engine_url(url)
    with progress(f"probing the engine at {url}"):
        return loop.run(look(url, model))


def engine_url(given: str) -> str:
    """The base of what people write for an engine: with a scheme, without `/v1` and what follows."""
    url = given.strip() if "://" in given else f"http://{given.strip()}"
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        named = False
    if not named:
        fail(f"--engine takes an address such as http://127.0.0.1:8000, not {given!r}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.partition('/v1')[0].rstrip('/')}"


def _tell(state: Any, answers: bool, json: bool) -> None:
    if json:
        print_json({"running": True, "answers": answers, "engine": state})
        return
    tell(f"{state.url}  {state.served_model_name}  pid {state.pid}")
    tell(f"{'answers' if answers else 'does not answer (yet)'}; its log: {state.log}")
