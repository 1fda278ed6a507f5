"""The command line: `polar-mitm`. Each command imports what it needs when it runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from polar_mitm import __version__
from polar_mitm.cli import demo, doctor, engine, inspect, run, up

app = typer.Typer(
    name="polar-mitm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run unmodified agent harnesses in a sandbox, answer them from vLLM, record every sampled token.",
    epilog="Start with `polar-mitm demo`; `polar-mitm doctor` says what is missing on this machine.",
)
app.command("run", context_settings={"allow_interspersed_args": False})(run.run)
app.command("up")(up.up)
app.add_typer(engine.app, name="engine")
app.command("calls")(inspect.calls)
app.command("show")(inspect.show)
app.command("reconstruct")(inspect.reconstruct)
app.command("export")(inspect.export)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


@app.command("addon-path")
def addon_path() -> None:
    """Print where the addon for stock mitmproxy lies: mitmdump -s "$(polar-mitm addon-path)" --set ..."""
    spec = find_spec("polar_mitm_addons.polar")
    print(spec.origin if spec else "")


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


def main() -> None:
    """Entry point of the console script."""
    app()
