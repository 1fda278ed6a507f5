"""The command line: `polar-mitm`. Each command imports what it needs when it runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, NoReturn

import typer

from polar_mitm import __version__
from polar_mitm.cli import (
    calls,
    collect,
    conformance,
    demo,
    doctor,
    engine,
    exits,
    replay,
    rl,
    run,
    seal,
    train,
    trajectories,
    up,
    verify,
)
from polar_mitm.cli.output import JsonFlag, print_json

_SETUP, _CAPTURE, _READ = "Set up", "Capture", "Read (also while a capture runs)"
_KEEP = "Keep (while no capture runs)"
_LEARN = "Learn"


app = typer.Typer(
    name="polar-mitm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run unmodified agent harnesses in a sandbox, answer them from vLLM, record every sampled token.",
    epilog=f"Start with `polar-mitm demo`; `polar-mitm doctor` says what is missing here.\n\n{exits.TEXT}",
)
app.command("demo", rich_help_panel=_SETUP, epilog=demo.EXAMPLES)(demo.demo)
app.command("doctor", rich_help_panel=_SETUP)(doctor.doctor)
app.command("conformance", rich_help_panel=_SETUP, epilog=conformance.EXAMPLES)(conformance.conformance)
app.add_typer(engine.app, name="engine", rich_help_panel=_SETUP)
app.command(
    "run",
    rich_help_panel=_CAPTURE,
    epilog=run.EXAMPLES,
    context_settings={"allow_interspersed_args": False},
)(run.run)
app.command("collect", rich_help_panel=_CAPTURE, epilog=collect.EXAMPLES)(collect.collect)
app.command("replay", rich_help_panel=_CAPTURE, epilog=replay.EXAMPLES)(replay.replay)
app.command("up", rich_help_panel=_CAPTURE, epilog=up.EXAMPLES)(up.up)


@app.command(
    "addon-path", rich_help_panel=_CAPTURE, epilog='$ mitmdump -s "$(polar-mitm addon-path)" --set ...'
)
def addon_path(json: JsonFlag = False) -> None:
    """Print where the addon for stock mitmproxy lies."""
    spec = find_spec("polar_mitm_addons.polar")
    if spec is None or spec.origin is None:
        exits.fail("the addons are not installed: install polar-mitm again", exits.SETUP)
    if json:
        print_json({"path": spec.origin})
    else:
        print(spec.origin)


app.command("calls", rich_help_panel=_READ, epilog=calls.CALLS_EXAMPLES)(calls.calls)
app.command("show", rich_help_panel=_READ, epilog=calls.SHOW_EXAMPLES)(calls.show)
app.command("reconstruct", rich_help_panel=_READ, epilog=trajectories.RECONSTRUCT_EXAMPLES)(
    trajectories.reconstruct
)
app.command("verify", rich_help_panel=_READ, epilog=verify.EXAMPLES)(verify.verify)
app.command("seal", rich_help_panel=_KEEP, epilog=seal.EXAMPLES)(seal.seal)
app.command("export", rich_help_panel=_READ, epilog=trajectories.EXPORT_EXAMPLES)(trajectories.export)
app.command("rl", rich_help_panel=_LEARN, epilog=rl.EXAMPLES)(rl.rl)
app.command("train", rich_help_panel=_LEARN, epilog=train.TRAIN_EXAMPLES)(train.train)
app.command("sft", rich_help_panel=_LEARN, epilog=train.SFT_EXAMPLES)(train.sft)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script: runs a command, and ends the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given[: given.index("--")] if "--" in given else given
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exits.interrupt)
    try:
        code = app(given, prog_name="polar-mitm", standalone_mode=False)
    except BaseException as error:
        code = exits.report(error, command=next(iter(given), ""), machine="--json" in own)
    raise SystemExit(code if isinstance(code, int) else 0)
