"""Addon: nothing leaves. The interceptor answers everything itself, so no upstream connection is ever right.

mitmproxy's hooks fail open: an exception in one makes it dial the original destination. Here that ends too.
"""

from __future__ import annotations

from mitmproxy.proxy.server_hooks import ServerConnectionHookData


class Egress:
    def server_connect(self, data: ServerConnectionHookData) -> None:
        data.server.error = "polar-mitm: the sandbox has no way out"
