"""An interceptor with a real store in a process of its own, to be killed.

    python -m tests.support.interceptor_process STORE ENGINE_URL NUM_ROLLOUTS

prints one JSON line, `{"ca": PEM, "ports": [...]}`, and serves until it dies.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from polar_mitm.cli import loop
from polar_mitm.config import Settings
from polar_mitm.store import Recorder
from polar_mitm.types import Rollout
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm_addons.interceptor import Interceptor
from tests.support.rig import listen


async def main(store: Path, engine_url: str, num_rollouts: int) -> None:
    recorder = Recorder(store)
    recorder.open()
    info = EngineInfo(engine_url, "scripted")
    async with Interceptor(Settings(head_grace_s=0.02), info, recorder) as interceptor:
        ports = []
        for n in range(num_rollouts):
            session = await interceptor.open_rollout(Rollout(f"r{n}"))
            sock, port = listen()
            await interceptor.serve(session, [sock])
            ports.append(port)
        print(json.dumps({"ca": interceptor.ca_pem.decode(), "ports": ports}), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    loop.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
