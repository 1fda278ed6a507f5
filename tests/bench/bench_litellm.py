"""Translating with capture against LiteLLM's proxy that translates only, in one run.

    python -m tests.bench.bench_litellm [--litellm PATH] [--json]

`/v1/messages` and `/v1/responses` (50 KB in, 32 tokens out, streamed), each made into a chat completion of
the same fake fast engine. What is compared: CPU of all of a proxy's processes per call, and when the client
has the first token. Runs alternate, so that what else the machine does falls on both.

Where the two differ, LiteLLM has the less to do: its client comes without TLS, the engine sends it words only
(no ids or logprobs, which it does not ask for), and it has no database, no keys and no logs. Ours captures
and stores. LiteLLM lives in an environment of its own, made below the cache unless `--litellm` names its
executable.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from polar_mitm.cache import default_cache
from tests.bench.bodies import ENDPOINTS, MODEL, chat_body, speaking
from tests.bench.client import Load, alternate, call_repeatedly, print_table
from tests.bench.processes import Side, fast_engine, free_port, interceptor, listening, spawned

VERSION = "1.106.2"
DIALECTS = ("anthropic", "openai_responses")
TARGETS = {"cpu": 1 / 8, "first token": 1 / 3}
"""Ours over LiteLLM's, at most."""

_ENVIRONMENT = {
    "LITELLM_LOG": "ERROR",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing is fetched at its start
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # checks no keys: the less to do
}


def installed(version: str) -> Path:
    """LiteLLM's executable, of an environment made when it is first wanted.

    Raises:
        subprocess.CalledProcessError: the installation fails.
    """
    folder = default_cache() / "bench" / f"litellm-{version}"
    executable = folder / "bin" / "litellm"  # what pip puts there last
    if not executable.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"litellm[proxy]=={version}"], check=True, stdout=sys.stderr)
    return executable


@contextlib.asynccontextmanager
async def litellm_proxy(executable: Path, engine_url: str, folder: Path) -> AsyncIterator[Side]:
    """LiteLLM's proxy in front of the engine: one worker, no database, no keys."""
    params = {
        "model": f"hosted_vllm/{MODEL}",
        "api_base": f"{engine_url}/v1",
        "api_key": "none",
        "use_chat_completions_api": True,  # /v1/responses, too, is translated and not passed on
    }
    config = folder / "litellm.yaml"
    config.write_text(
        json.dumps(  # which is YAML
            {
                "model_list": [{"model_name": MODEL, "litellm_params": params}],
                "litellm_settings": {"drop_params": True},
            }
        )
    )
    port = free_port()
    command = [str(executable), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    async with spawned(*command, "--telemetry", "False", line=False, env=_ENVIRONMENT) as (process, _):
        await listening(port, wait_s=300)
        yield Side("litellm", process.pid, port, "localhost", "", plain=True)


async def measure(executable: Path, options: argparse.Namespace) -> dict[str, dict[str, Load]]:
    """Both sides in both dialects, and the engine itself (times only): clients -> side -> what it took."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            fast_engine(options.tokens, options.delay, options.body_bytes // 4) as url,
            litellm_proxy(executable, url, Path(folder)) as theirs,
            interceptor(url, Path(folder), num_rollouts=len(DIALECTS)) as ours,
        ):
            sides = []
            for dialect, mine in zip(DIALECTS, ours, strict=True):
                body = chat_body(options.body_bytes, dialect)
                sides += [(speaking(mine, dialect), body), (speaking(theirs, dialect), body)]
            port = urlsplit(url).port or 0
            direct = Side("engine", 0, port, "localhost", ENDPOINTS["openai_chat"][1], plain=True)
            body = chat_body(options.body_bytes, "openai_chat")
            results = {}
            for clients in (1, options.clients):
                calls = max(5, options.calls // clients)
                many = {"rounds": options.rounds, "calls": calls, "clients": clients}
                loads = await alternate(sides, tokens=options.tokens, **many)
                loads[direct.name] = Load()
                await call_repeatedly(direct, body, calls, loads[direct.name])
                results[f"{clients} in flight"] = loads
    return results


def rows(loads: dict[str, Load]) -> dict[str, dict[str, Any]]:
    """The table: dialect -> column -> figure; a ratio is ours over LiteLLM's."""
    table = {}
    for dialect in DIALECTS:
        ours, theirs = loads[f"polar-mitm {dialect}"], loads[f"litellm {dialect}"]
        table[ENDPOINTS[dialect][1]] = {
            "cpu ms": round(ours.cpu_ms_per_call, 2),
            "litellm's": round(theirs.cpu_ms_per_call, 2),
            "ratio": round(ours.cpu_ms_per_call / theirs.cpu_ms_per_call, 3),
            "first token ms": round(ours.first_token_ms, 2),
            "its": round(theirs.first_token_ms, 2),
            "the engine's": round(loads["engine"].first_token_ms, 2),
            "its ratio": round(ours.first_token_ms / theirs.first_token_ms, 3),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--litellm", type=Path, help="its executable (default: installed in the cache)")
    parser.add_argument("--version", default=VERSION, help=f"which to install (default {VERSION})")
    parser.add_argument("--calls", type=int, default=200, help="calls per round and side (default 200)")
    parser.add_argument("--clients", type=int, default=16, help="calls in flight at once (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of the answer (default 32)")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds between tokens (default 0: none)")
    parser.add_argument("--body-bytes", type=int, default=50_000, help="request size (default 50000)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    executable = options.litellm or installed(options.version)
    results = {name: rows(loads) for name, loads in asyncio.run(measure(executable, options)).items()}
    if options.json:
        print(json.dumps(results))
        return
    for name, table in results.items():
        print(name)
        print_table(table)
    print("wanted: " + ", ".join(f"{what} at most {most:.3f}" for what, most in TARGETS.items()))


if __name__ == "__main__":
    main()
