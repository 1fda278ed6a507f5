"""A connection handler that calls addons directly.

mitmproxy's `AddonManager` walks all addons for every hook, and once more for an `update` that nobody here
wants. An embedded interceptor's addons never change, so which of them answer a hook can be looked up once.
Under stock mitmdump its own manager stays in charge.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from mitmproxy import addonmanager
from mitmproxy.master import Master
from mitmproxy.proxy.commands import StartHook
from mitmproxy.proxy.mode_servers import ProxyConnectionHandler

logger = logging.getLogger(__name__)


def direct_handler(master: Master) -> type[ProxyConnectionHandler]:
    """A handler class for the addons that `master` has now. As in the stock one, an addon that raises is
    logged and the next one is called."""
    addons = list(addonmanager.traverse(master.addons.chain))

    @functools.cache
    def methods(name: str) -> list[Callable[[Any], Any]]:
        return [getattr(addon, name) for addon in addons if callable(getattr(addon, name, None))]

    class DirectHandler(ProxyConnectionHandler):
        async def handle_hook(self, hook: StartHook) -> None:
            (data,) = hook.args()
            with self.timeout_watchdog.disarm():
                for method in methods(hook.name):
                    try:
                        result = method(data)
                        if inspect.isawaitable(result):
                            await result
                    except Exception:
                        logger.exception("addon error in %s", hook.name)

    return DirectHandler
