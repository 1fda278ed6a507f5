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
    options: argparse.Namespace, tokens: int, delay_s: float, loads: list[tuple[int, int]]
) -> tuple[list[Loads], float]:
    """What each dialect, both stocks and (without CPU) the engine took, and our memory in MiB.

    `loads`: one comparison each, (calls per client and round, clients).
    """
    stream = delay_s > 0  # stock collects an answer unless told to stream
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        num_ids = options.body_bytes // 4
        async with (
            fast_engine(tokens, delay_s, num_ids) as url,
            fast_engine(tokens, delay_s, num_ids, certificate=self_signed(path)) as tls_url,
            stock_mitmdump(url, path, stream=stream) as stock,
            stock_mitmdump(tls_url, path, stream=stream) as stock_tls,
            interceptor(url, path, num_rollouts=len(ENDPOINTS)) as ours,
        ):
            through = engine_body(options.body_bytes)
            sides = [(stock, through)]
            sides += [
                (speaking(side, dialect, name=dialect), chat_body(options.body_bytes, dialect))
                for side, dialect in zip(ours, ENDPOINTS, strict=True)
            ]
            sides += [(stock_tls, through)]
            direct = Side(DIRECT, 0, urlsplit(url).port or 0, "localhost", stock.path, plain=True)
            results = []
            for calls, clients in loads:
                many = {"rounds": options.rounds, "calls": calls, "clients": clients}
                results.append(await alternate(sides, tokens=tokens, **many))
                results[-1][DIRECT] = Load()
                await call_repeatedly(direct, through, calls, results[-1][DIRECT])
            return results, rss_mb(ours[0].pid)


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
    calls, clients, delay_s = options.calls, options.clients, options.delay
    (alone, many), memory_mb = await measure(
        options, 32, 0, [(calls, 1), (max(5, calls // clients), clients)]
    )
    paced = [(max(5, calls // 20), 8)]
    (short,), _ = await measure(options, 2, delay_s, paced)
    (long,), _ = await measure(options, 2 + options.tokens, delay_s, paced)
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
