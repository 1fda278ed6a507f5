"""`polar-mitm up`: an interceptor that stays, for sandboxes that other processes run."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from polar_mitm.cli import loop
from polar_mitm.cli.engine import EngineOption, ModelOption, probed
from polar_mitm.cli.exits import SETUP, fail
from polar_mitm.cli.output import JsonFlag, print_json, say
from polar_mitm.cli.settings import ConfigOption, MaxTokensOption, settings_from
from polar_mitm.config import Settings
from polar_mitm.upstream.engine import EngineInfo

EXAMPLES = (
    "$ polar-mitm up --store runs.duckdb &\n\n"
    "$ polar-mitm run --control runs.duckdb.sock -- claude -p 'fix the failing test'\n\n"
    "$ polar-mitm calls --store runs.duckdb"
)


def up(
    store: Annotated[
        Path,
        typer.Option("--store", "-s", metavar="FILE", help="DuckDB file to record into; made where missing."),
    ],
    engine: EngineOption = None,
    model: ModelOption = "",
    control: Annotated[
        Path | None,
        typer.Option(
            metavar="SOCKET", help="UNIX socket for runners; by default the store's name and .sock."
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, metavar="N", help="Prometheus metrics on http://127.0.0.1:N/metrics."),
    ] = None,
    max_tokens: MaxTokensOption = None,
    config: ConfigOption = None,
    json: JsonFlag = False,
) -> None:
    """Run an interceptor that stays, for `run --control`.

    Until Ctrl-C or SIGTERM. Rollouts of many `polar-mitm run --control SOCKET`
    share its store and its engine. Only its own user, and root, may use the
    socket; no sandbox sees it.
    """
    door = (control or store.with_name(store.name + ".sock")).absolute()
    _check(store, door, metrics_port)
    settings = settings_from(config, max_tokens=max_tokens)
    info = probed(engine or settings.engine, model or settings.engine_model)
    loop.run(_serve(settings, info, store.absolute(), door, metrics_port, json))


def _check(store: Path, door: Path, metrics_port: int | None) -> None:
    """Refuse what cannot work before anything is made: a busy store, socket or port."""
    from polar_mitm.store.share import find_live

    if store.is_dir():
        fail(f"--store takes a file, and {store} is a directory")
    if live := find_live(store.absolute()):
        fail(f"process {live.pid} records into {store} already: stop it first, or use another store")
    if len(str(door).encode()) > 107:  # unix(7), sun_path
        fail(f"--control: {door} is too long for a socket's address (107 bytes): give a shorter one")
    if door.exists() and not door.is_socket():
        fail(f"--control: {door} exists and is no socket")
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as runner:
        runner.connect(str(door))
        fail(f"--control: another interceptor serves {door}: stop it first, or use another socket")
    if metrics_port:
        try:
            socket.create_server(("127.0.0.1", metrics_port)).close()
        except OSError as error:
            fail(f"--metrics-port: cannot listen on 127.0.0.1:{metrics_port}: {error.strerror}", SETUP)


async def _serve(
    settings: Settings, info: EngineInfo, store: Path, door: Path, metrics_port: int | None, json: bool
) -> None:
    from polar_mitm.cli.hosting import embedded
    from polar_mitm_addons.control import Control

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with embedded(settings, info, store) as host:
        if metrics_port:
            host.interceptor.chain.metrics.serve(metrics_port)
        control = Control(host.interceptor, door)
        try:
            control.start()
        except OSError as error:
            fail(f"--control: cannot listen on {door}: {error.strerror or error}")
        try:
            _announce(host.store, info, door, metrics_port, json)
            await stop.wait()
        finally:
            await control.close()
    if not json:
        say("stopped")


def _announce(store: Path, info: EngineInfo, door: Path, metrics_port: int | None, json: bool) -> None:
    metrics = f"http://127.0.0.1:{metrics_port}/metrics" if metrics_port else None
    if json:
        print_json({"control": door, "store": store, "engine": info, "metrics": metrics})
        return
    say(f"capturing into {store}, answered by {info.url} ({info.model})")
    if metrics:
        say(f"metrics at {metrics}")
    say(f"run a harness: polar-mitm run --control {door} -- claude -p '...'")
    say("Ctrl-C stops it")
