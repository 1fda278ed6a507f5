"""`polar-mitm up`: an interceptor that stays, for sandboxes that other processes run."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import typer

from polar_mitm.cli import loop
from polar_mitm.cli.engine import EngineOption, ModelOption, probed
from polar_mitm.cli.inspect import StoreOption
from polar_mitm.cli.output import JsonFlag, fail, print_json, say
from polar_mitm.cli.settings import ConfigOption, MaxTokensOption, settings_from
from polar_mitm.config import Settings
from polar_mitm.upstream.engine import EngineInfo


def up(
    store: StoreOption,
    engine: EngineOption = None,
    model: ModelOption = "",
    control: Annotated[
        Path | None, typer.Option(help="UNIX socket for runners; next to the store by default.")
    ] = None,
    metrics_port: Annotated[int, typer.Option(help="Serve Prometheus metrics on this loopback port.")] = 0,
    max_tokens: MaxTokensOption = None,
    config: ConfigOption = None,
    json: JsonFlag = False,
) -> None:
    """Run an interceptor until Ctrl-C; `polar-mitm run --control SOCKET -- ...` uses it from elsewhere."""
    settings = settings_from(config, max_tokens=max_tokens)
    info = probed(engine or settings.engine, model or settings.engine_model)
    socket_path = control or store.with_name(store.name + ".sock")
    try:
        loop.run(_serve(settings, info, store, socket_path, metrics_port, json))
    except OSError as error:
        fail(str(error))


async def _serve(
    settings: Settings, info: EngineInfo, store: Path, control: Path, metrics_port: int, json: bool
) -> None:
    from polar_mitm.cli.hosting import embedded
    from polar_mitm_addons.control import Control

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with embedded(settings, info, store) as host:
        if metrics_port:
            host.interceptor.chain.metrics.serve(metrics_port)
        door = Control(host.interceptor, control)
        door.start()
        try:
            if json:
                print_json({"control": control, "store": store, "engine": info})
            else:
                say(f"capturing into {store}, engine {info.url} ({info.model})")
                say(f"run a harness: polar-mitm run --control {control} -- claude -p '...'")
            await stop.wait()
        finally:
            await door.close()
