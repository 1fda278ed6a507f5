"""The environment variables of a sandbox: few, and none that says where a provider is."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence

from polar_mitm_sandbox import trust
from polar_mitm_sandbox.spec import HOME

STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Interception must work without the harness's help, so nothing may tell it about a proxy or another address.
_TELLTALE = re.compile(r"(^(https?|all|no|ftp|wss?)_proxy$)|(_(base_url|api_base)$)", re.IGNORECASE)


def build(
    env: Mapping[str, str], path: Sequence[str], mechanisms: Collection[str] | None = None
) -> dict[str, str]:
    """Everything the harness's process starts with. Trust variables (of `mechanisms`) win over `env`."""
    base = {
        "HOME": HOME,
        "USER": "agent",
        "LOGNAME": "agent",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
    }
    given = {name: value for name, value in env.items() if not _TELLTALE.search(name)}
    search = ":".join([*path, given.pop("PATH", STANDARD_PATH)])
    return base | given | {"PATH": search} | trust.environment(mechanisms)
