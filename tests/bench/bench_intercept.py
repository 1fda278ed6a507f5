"""CPU and latency of interception against stock mitmdump passing the same traffic through, in one run.

    python -m tests.bench.bench_intercept [--json]

Three questions, each answered with a ratio:
- CPU per call: 50 KB request, 32-token answer, translated, captured and stored, against pass-through;
- CPU per streamed token, one engine chunk each, against pass-through per event;
- how much later the first token comes than straight from the engine.

The proxies serve the same client over TLS from the same fake fast engine. Stock mitmdump runs twice: with the
engine in plain text, as we reach it, and over TLS, as it would reach the provider that a harness calls. Runs
of the sides alternate, so that what else the machine does falls on all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench.client import Load, call_repeatedly, chat_body
from tests.bench.processes import Side, cpu_s, fast_engine, interceptor, rss_mb, self_signed, stock_mitmdump


async def _cpu_of(side: Side, body: bytes, num_calls: int, num_clients: int) -> tuple[float, Load]:
    """Seconds of CPU that `side` spent on `num_calls` calls by each of `num_clients`."""
    load = Load()
    before = cpu_s(side.pid)
    await asyncio.gather(*(call_repeatedly(side, body, num_calls, load) for _ in range(num_clients)))
    return cpu_s(side.pid) - before, load


async def _alternate(
    sides: list[tuple[Side, bytes]], rounds: int, num_calls: int, num_clients: int
) -> dict[str, tuple[float, Load]]:
    out: dict[str, tuple[float, Load]] = {}
    for side, body in sides:
        await _cpu_of(side, body, 10, num_clients)  # certificates, caches, the adaptive interpreter
    for _ in range(rounds):
        for side, body in sides:
            spent, load = await _cpu_of(side, body, num_calls, num_clients)
            total, all_loads = out.get(side.name, (0.0, Load()))
            all_loads.first_s += load.first_s
            all_loads.num_complete += load.num_complete
            out[side.name] = (total + spent, all_loads)
    return out


async def measure(
    *, tokens: int, delay_s: float, rounds: int, calls: int, clients: int, body_bytes: int, stream: bool
) -> dict[str, float]:
    """One comparison; milliseconds of CPU per call on either side, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        num_ids = body_bytes // 4
        async with (
            fast_engine(tokens, delay_s, num_ids) as url,
            fast_engine(tokens, delay_s, num_ids, certificate=self_signed(path)) as tls_url,
            stock_mitmdump(url, path, stream=stream) as stock,
            stock_mitmdump(tls_url, path, stream=stream) as stock_tls,
            interceptor(url, path) as (ours,),
        ):
            address = urlsplit(url)
            direct = Side("direct", 0, address.port or 0, "localhost", stock.path, plain=True)
            theirs_body = chat_body(body_bytes, provider="openai")
            ours_body = chat_body(body_bytes, provider="anthropic")
            sides = [(stock, theirs_body), (ours, ours_body), (stock_tls, theirs_body)]
            results = await _alternate(sides, rounds, calls, clients)
            straight = Load()
            await call_repeatedly(direct, theirs_body, calls, straight)
            memory = rss_mb(ours.pid)
    per_call = {name: spent / load.num_complete * 1000 for name, (spent, load) in results.items()}
    first = {name: statistics.median(load.first_s) * 1000 for name, (_, load) in results.items()}
    return {
        "ours_cpu_ms_per_call": round(per_call["polar-mitm"], 3),
        "stock_cpu_ms_per_call": round(per_call["stock mitmdump"], 3),
        "stock_tls_cpu_ms_per_call": round(per_call["stock mitmdump, TLS"], 3),
        "cpu_ratio": round(per_call["polar-mitm"] / per_call["stock mitmdump"], 3),
        "cpu_ratio_tls": round(per_call["polar-mitm"] / per_call["stock mitmdump, TLS"], 3),
        "ours_first_byte_ms": round(first["polar-mitm"], 3),
        "stock_first_byte_ms": round(first["stock mitmdump"], 3),
        "direct_first_byte_ms": round(statistics.median(straight.first_s) * 1000, 3),
        "ours_rss_mb": round(memory, 1),
    }


async def _main(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    common = {"rounds": options.rounds, "body_bytes": options.body_bytes}
    quick = {"tokens": 32, "delay_s": 0, "stream": False}
    alone = await measure(calls=options.calls, clients=1, **quick, **common)
    many = options.clients
    call = await measure(calls=max(5, options.calls // many), clients=many, **quick, **common)
    # The slope between a short and a long answer is the cost of a token alone.
    slow = {"delay_s": options.delay, "clients": 8, "calls": max(5, options.calls // 20), "stream": True}
    short = await measure(tokens=2, **slow, **common)
    long = await measure(tokens=2 + options.tokens, **slow, **common)
    ours, stock, stock_tls = (
        (long[f"{side}_cpu_ms_per_call"] - short[f"{side}_cpu_ms_per_call"]) / options.tokens * 1000
        for side in ("ours", "stock", "stock_tls")
    )
    token = {
        "ours_cpu_us_per_token": round(ours, 1),
        "stock_cpu_us_per_event": round(stock, 1),
        "stock_tls_cpu_us_per_event": round(stock_tls, 1),
        "cpu_ratio": round(ours / stock, 3),
        "cpu_ratio_tls": round(ours / stock_tls, 3),
    }
    first = {
        "ours_ms_later_than_direct": round(alone["ours_first_byte_ms"] - alone["direct_first_byte_ms"], 3),
        "stock_ms_later_than_direct": round(alone["stock_first_byte_ms"] - alone["direct_first_byte_ms"], 3),
    }
    return {f"call, {many} clients": call, "call, 1 client": alone, "token": token, "first byte": first}


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
    for name, figures in results.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:>24}  {value}")


if __name__ == "__main__":
    main()
