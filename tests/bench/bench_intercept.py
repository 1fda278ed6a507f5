"""CPU and latency of interception against stock mitmdump passing the same traffic through, in one run.

    python -m tests.bench.bench_intercept [--json]

Three questions, each answered per dialect, with a ratio:
- CPU per call: 50 KB request, 32-token answer, translated, captured and stored, against pass-through;
- CPU per streamed token, one engine chunk each, against pass-through per event;
- how much later the first byte of an answer comes than straight from the engine.

The proxies serve the same client over TLS from the same fake fast engine. Stock mitmdump runs twice: with the
engine in plain text, as we reach it, and over TLS, as it would reach the provider that a harness calls. Both
pass through what the engine speaks, OpenAI's chat with the ids and logprobs that we ask for. Runs of the
sides alternate, so that what else the machine does falls on all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench.bodies import ENDPOINTS, chat_body, engine_body, speaking
from tests.bench.client import Load, alternate, call_repeatedly, print_table
from tests.bench.processes import Side, fast_engine, interceptor, rss_mb, self_signed, stock_mitmdump

STOCK, STOCK_TLS, DIRECT = "stock mitmdump", "stock mitmdump, TLS", "engine"
Loads = dict[str, Load]


async def measure(
    *, tokens: int, delay_s: float, rounds: int, calls: int, clients: int, body_bytes: int, stream: bool
) -> tuple[Loads, float]:
    """One comparison: what each dialect, both stocks and (without CPU) the engine took; our memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        num_ids = body_bytes // 4
        async with (
            fast_engine(tokens, delay_s, num_ids) as url,
            fast_engine(tokens, delay_s, num_ids, certificate=self_signed(path)) as tls_url,
            stock_mitmdump(url, path, stream=stream) as stock,
            stock_mitmdump(tls_url, path, stream=stream) as stock_tls,
            interceptor(url, path, num_rollouts=len(ENDPOINTS)) as ours,
        ):
            through = engine_body(body_bytes)
            sides = [(stock, through)]
            sides += [
                (speaking(side, dialect, name=dialect), chat_body(body_bytes, dialect))
                for side, dialect in zip(ours, ENDPOINTS, strict=True)
            ]
            sides += [(stock_tls, through)]
            loads = await alternate(sides, tokens=tokens, rounds=rounds, calls=calls, clients=clients)
            direct = Side(DIRECT, 0, urlsplit(url).port or 0, "localhost", stock.path, plain=True)
            loads[DIRECT] = Load()
            await call_repeatedly(direct, through, calls, loads[DIRECT])
            return loads, rss_mb(ours[0].pid)


def rows(many: Loads, alone: Loads, short: Loads, long: Loads, num_tokens: int) -> dict[str, dict[str, Any]]:
    """The table: side -> column -> figure."""

    def per_token(name: str) -> float:
        """The slope between a short and a long answer is the cost of a token alone."""
        return (long[name].cpu_ms_per_call - short[name].cpu_ms_per_call) / num_tokens * 1000

    table = {}
    for name in (*ENDPOINTS, STOCK, STOCK_TLS):
        cpu, lone, token = many[name].cpu_ms_per_call, alone[name].cpu_ms_per_call, per_token(name)
        table[name] = {
            "call ms": round(cpu, 2),
            "/stock": round(cpu / many[STOCK].cpu_ms_per_call, 2),
            "/stock TLS": round(cpu / many[STOCK_TLS].cpu_ms_per_call, 2),
            "alone ms": round(lone, 2),
            "alone/stock": round(lone / alone[STOCK].cpu_ms_per_call, 2),
            "token us": round(token, 1),
            "token/stock": round(token / per_token(STOCK), 2),
            "token/stock TLS": round(token / per_token(STOCK_TLS), 2),
            "first byte +ms": round(alone[name].first_byte_ms - alone[DIRECT].first_byte_ms, 2),
        }
    return table


async def _main(options: argparse.Namespace) -> dict[str, Any]:
    common = {"rounds": options.rounds, "body_bytes": options.body_bytes}
    quick = {"tokens": 32, "delay_s": 0, "stream": False}
    alone, _ = await measure(calls=options.calls, clients=1, **quick, **common)
    clients = options.clients
    many, memory_mb = await measure(
        calls=max(5, options.calls // clients), clients=clients, **quick, **common
    )
    slow = {"delay_s": options.delay, "clients": 8, "calls": max(5, options.calls // 20), "stream": True}
    short, _ = await measure(tokens=2, **slow, **common)
    long, _ = await measure(tokens=2 + options.tokens, **slow, **common)
    return {"table": rows(many, alone, short, long, options.tokens), "rss_mb": round(memory_mb, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=200, help="calls per round and side (default 200)")
    parser.add_argument("--clients", type=int, default=16, help="calls in flight at once (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the streamed answer (default 256)")
    parser.add_argument("--delay", type=float, default=0.004, help="seconds between tokens (default 0.004)")
    parser.add_argument("--body-bytes", type=int, default=50_000, help="request size (default 50000)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    results = asyncio.run(_main(options))
    if options.json:
        print(json.dumps(results))
        return
    print(
        f"CPU per call with {options.clients} clients and with one alone; per token; first byte, one client"
    )
    print_table(results["table"])
    print(f"interceptor: {results['rss_mb']} MiB")


if __name__ == "__main__":
    main()
