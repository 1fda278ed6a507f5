"""Entry point for stock mitmproxy: `mitmdump -s addons/polar.py --set polar_store=F --set polar_engine=URL`.

`polar-mitm addon-path` prints where this file was installed. All modes of mitmproxy work; connections that
no runner handed over (`polar_control`) belong to the rollout named by `polar_rollout`. mitmproxy listens
before the engine has been probed: until the log says "capturing", requests get mitmproxy's own 502.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, NoReturn

from mitmproxy import certs, ctx, exceptions
from mitmproxy.addonmanager import Loader
from mitmproxy.options import CONF_BASENAME
from mitmproxy.proxy.layer import NextLayer

from polar_mitm import config  # the module: a name `load` here would be a hook of mitmproxy
from polar_mitm.dialects.ids import new_id
from polar_mitm.errors import EngineUnfit, StoreError
from polar_mitm.store import Recorder
from polar_mitm.types import Rollout
from polar_mitm.upstream.probe import probe
from polar_mitm_addons.chain import OPTIONS
from polar_mitm_addons.control import Control
from polar_mitm_addons.egress import Egress
from polar_mitm_addons.interceptor import Serving

logger = logging.getLogger(__name__)


class Polar:
    """Adds the options, and our chain of addons once mitmproxy runs."""

    def __init__(self) -> None:
        self.addons: list[Any] = [Egress()]  # before we can capture, nothing leaves either
        self._serving: Serving | None = None
        self._control: Control | None = None

    def load(self, loader: Loader) -> None:
        loader.add_option("polar_store", str, "", "DuckDB file that the capture goes to")
        loader.add_option("polar_engine", str, "", "URL of the vLLM engine, without /v1")
        loader.add_option("polar_model", str, "", "Which of the engine's models; its first by default")
        loader.add_option("polar_config", str, "", "TOML file with further settings")
        loader.add_option("polar_rollout", str, "", "Rollout that unassigned connections belong to")
        loader.add_option("polar_control", str, "", "UNIX socket through which runners hand over sandboxes")

    async def running(self) -> None:
        options = ctx.options
        try:
            if not options.polar_store or not options.polar_engine:
                raise exceptions.OptionsError(
                    "polar.py needs --set polar_store=FILE and --set polar_engine=URL"
                )
            file = Path(options.polar_config) if options.polar_config else None
            settings = config.load(file, engine=options.polar_engine, engine_model=options.polar_model)
            engine = await probe(settings.engine, settings.engine_model)
            recorder = Recorder(Path(options.polar_store), flush_interval_s=settings.flush_interval_s)
            recorder.open()
        except (EngineUnfit, StoreError, OSError, ValueError, exceptions.OptionsError) as error:
            _give_up(error)
        options.update(**OPTIONS)
        self._rollout = Rollout(options.polar_rollout or new_id(), harness="mitmproxy")
        self._serving = serving = Serving(settings, engine, recorder)
        serving.ca_pem = _certificate(options.confdir, options.key_size)
        serving.capture.default = await serving.open_rollout(self._rollout)
        self.addons = [NextLayerFirst(), *serving.chain.addons]
        if options.polar_control:
            control = Control(serving, Path(options.polar_control))
            try:
                control.start()
            except OSError as error:
                _give_up(error)
            self._control = control

        logger.info("polar-mitm: capturing into %s, engine %s", options.polar_store, engine.url)

    async def done(self) -> None:
        serving, self._serving = self._serving, None
        if serving is None:
            return
        if self._control is not None:
            await self._control.close()
        self._rollout.status = "completed"
        if serving.capture.default is not None:
            await serving.close_rollout(serving.capture.default, self._rollout)
        await serving.close()
        await asyncio.to_thread(serving.recorder.close)


class NextLayerFirst:
    """Addon: mitmproxy runs scripts before its own `NextLayer`, but our `Streaming` has to come after it."""

    def next_layer(self, nextlayer: NextLayer) -> None:
        ctx.master.addons.get("nextlayer").next_layer(nextlayer)


def _give_up(error: Exception) -> NoReturn:
    """An interceptor that cannot do what was asked does not run on as something else."""
    ctx.master.shutdown()
    raise SystemExit(f"polar-mitm: {error}") from error


def _certificate(confdir: str, key_size: int) -> bytes:
    """mitmproxy's CA, for runners and their sandboxes; made here where mitmproxy has not come to it."""
    folder = Path(confdir).expanduser()
    certs.CertStore.from_store(folder, CONF_BASENAME, key_size)
    return (folder / f"{CONF_BASENAME}-ca-cert.pem").read_bytes()


addons = [Polar()]
