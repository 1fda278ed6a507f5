"""What continuing a call by its ids adds to the time of its first byte, beyond the engine's own rendering.

    python -m tests.bench.bench_continuation [--json]

One interceptor, one engine, the same request bytes on both sides: in one rollout their history's last answer
is known, in the other it is not, so that the call is rendered by the engine as in any capture. Each request
is new (a retry would be free), and they all continue the same call, which a lineage forgets after some 200
forks; the sides alternate. `verbatim`: the answer has its sampled ids in the
rendering; `re-split`: it has others, and both texts are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from polar_mitm.store import open_reader
from tests.bench.bodies import chat_body
from tests.bench.client import request_bytes, tls
from tests.bench.continuing_engine import RESPLIT
from tests.bench.processes import Side, interceptor, spawned


class Connection:
    """One kept connection; `ask` gives seconds to the first byte of the body, and the body."""

    def __init__(self, side: Side) -> None:
        self._side = side

    async def open(self) -> Connection:
        side = self._side
        context = None if side.plain else tls()
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1",
            side.port,
            ssl=context,
            server_hostname=side.server_name if context else None,
            limit=1 << 22,
        )
        return self

    async def ask(self, body: bytes) -> tuple[float, bytes]:
        data = request_bytes(self._side, body)
        start = time.perf_counter()
        self._writer.write(data)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{self._side.name}: {head[:200]!r}")
        if b"chunked" not in head:
            whole = await self._reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            return time.perf_counter() - start, whole
        out, first = [], 0.0
        while True:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            first = first or time.perf_counter() - start
            out.append((await self._reader.readexactly(size + 2))[:-2])
            if size == 0:
                return first, b"".join(out)


def _history(stream: bytes) -> dict[str, Any]:
    """The assistant's message that a harness makes of a streamed answer."""
    text = ""
    for line in stream.split(b"\n"):
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            text += event.get("delta", {}).get("text", "")
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


async def measure(num_tokens: int, body_bytes: int, rounds: int) -> dict[str, float]:
    asked = json.loads(chat_body(body_bytes, "anthropic"))
    with tempfile.TemporaryDirectory() as folder:
        engine = spawned(sys.executable, "-m", "tests.bench.continuing_engine", str(num_tokens))
        async with engine as (_, url):
            port = urlsplit(url).port or 0
            async with interceptor(url, Path(folder), num_rollouts=2) as (known, unknown):
                continued, plain = await Connection(known).open(), await Connection(unknown).open()
                direct = Side("engine", 0, port, "localhost", "/v1/chat/completions/render", plain=True)
                engine_render = await Connection(direct).open()
                _, stream = await continued.ask(msgspec.json.encode(asked))
                history = [*asked["messages"], _history(stream)]
                times: dict[str, list[float]] = {}
                for n in range(rounds + 10):
                    for kind in ("verbatim", "re-split"):
                        mark = RESPLIT.decode() if kind == "re-split" else "same"
                        new = {"role": "user", "content": f"go on {n} {mark}"}
                        body = msgspec.json.encode({**asked, "messages": [*history, new]})
                        now = {
                            "plain": (await plain.ask(body))[0],
                            kind: (await continued.ask(body))[0],
                            "render": (await engine_render.ask(body))[0],
                        }
                        if n >= 10:  # certificates, caches, the adaptive interpreter
                            for name, seconds in now.items():
                                times.setdefault(name, []).append(seconds * 1000)
            with open_reader(Path(folder) / "bench.duckdb") as store:
                calls = store.calls(tokens=False)
    # What was measured is what is claimed.
    exact = [call for call in calls if call.continuation == "exact"]
    assert len(exact) == 2 * (rounds + 10) == 2 * sum(call.edits == ["retokenised"] for call in exact)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "prompt_tokens": num_tokens,
        "request_bytes": body_bytes,
        "plain_first_byte_ms": round(median["plain"], 3),
        "engine_render_ms": round(median["render"], 3),
        **{
            f"{kind}_{what}": round(value, 3)
            for kind in ("verbatim", "re-split")
            for what, value in (
                ("first_byte_ms", median[kind]),
                ("added_beyond_render_ms", median[kind] - median["plain"] - median["render"]),
            )
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the prompt (default 16384)")
    parser.add_argument("--body-bytes", type=int, default=65_536, help="request size (default 65536)")
    parser.add_argument("--rounds", type=int, default=80, help="alternating rounds (default 80)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    result = asyncio.run(measure(options.tokens, options.body_bytes, options.rounds))
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"  {key:>34}  {value}")


if __name__ == "__main__":
    main()
