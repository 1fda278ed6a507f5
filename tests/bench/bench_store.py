"""How fast a store takes calls, against DuckDB itself, and how many bytes a token costs.

    python tests/bench/bench_store.py [--calls N] [--in-flight N] [--json]

Ingest: sessions of 20 turns that begin with 1,000 tokens, 50 KB of raw bytes per call (a request that repeats
the history, its translation for the engine, a stream). `--in-flight` calls wait at any time. Time runs until
the last is durable and the store is closed. `raw` inserts the very same final rows, ready as an Arrow table,
in the very same batches, into the same table, and checkpoints: DuckDB alone, on rows that redaction,
compression and chaining have made small. `as_received` inserts what the recorder was given: whole prompts and
bodies. Rounds alternate; a ratio is one of medians.

Size: sessions of 50 turns without wire (18,000 tokens first, then 200 to 1,600 new ones and 40 to 300 sampled
ones per turn), the file measured after it is closed, per new token: less an empty store's size, and with it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa

from polar_mitm.dialects.ids import new_id
from polar_mitm.store import Recorder, schema
from polar_mitm.store.writer import Batch
from polar_mitm.token_ids import TokenIds
from polar_mitm.types import ModelCall, Usage, Wire

VOCABULARY = 151_936  # Qwen's
TURNS = 20
SAME_TABLE = "ALTER TABLE call_rows RENAME TO raw"
BULK_TABLE = """
    CREATE TABLE raw (
        call_id VARCHAR, rollout_id VARCHAR, prompt INTEGER[], completion INTEGER[], logprobs FLOAT[],
        request BLOB USING COMPRESSION uncompressed, upstream BLOB USING COMPRESSION uncompressed,
        response BLOB USING COMPRESSION uncompressed
    )
"""
HEADERS = [(f"x-header-{i}", f"some value, {i}, as headers have") for i in range(12)]


def token_ids(rng: np.random.Generator, n: int) -> list[int]:
    """Ids whose frequencies follow Zipf's law, as a tokenizer's do: low ids are common."""
    uniform = rng.random(n)
    return np.minimum(np.exp(uniform * np.log(VOCABULARY)), VOCABULARY - 1).astype(np.int32).tolist()


def logprobs(rng: np.random.Generator, n: int) -> list[float]:
    """float32 logprobs with the shape of an instruct model's: most near 0, a long tail."""
    kind = rng.random(n)
    nats = np.where(kind < 0.55, rng.gamma(0.3, 2e-4, n), rng.gamma(0.6, 0.15, n))
    nats = np.where(kind > 0.85, rng.gamma(1.2, 0.9, n), nats)
    # As log_softmax leaves them: a difference of float32 values around 20.
    return (np.float32(20) - nats.astype(np.float32) - np.float32(20)).astype(np.float64).tolist()


def session(rng: np.random.Generator, turns: int, first: int, new: tuple[int, int], sampled: tuple[int, int]):
    """(prompt, completion, logprobs) of each turn; each prompt extends the last."""
    prompt = token_ids(rng, first)
    for _ in range(turns):
        n = int(rng.integers(*sampled))
        completion = token_ids(rng, n)
        yield list(prompt), completion, logprobs(rng, n)
        prompt += completion + token_ids(rng, int(rng.integers(*new)))


def ingest_calls(num: int) -> list[ModelCall]:
    """Calls of interleaved sessions, 64 at a time."""
    rng, chance = np.random.default_rng(0), random.Random(0)
    words = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz_", k=chance.randint(2, 11))) for _ in range(4000)
    ]
    system = _text(chance, words, 15_000)
    sessions = [_ingest_session(rng, chance, words, system) for _ in range(-(-num // TURNS))]
    waves = (sessions[i : i + 64] for i in range(0, len(sessions), 64))
    return [call for wave in waves for turn in zip(*wave, strict=True) for call in turn][:num]


def _ingest_session(
    rng: np.random.Generator, chance: random.Random, words: list[str], system: str
) -> list[ModelCall]:
    rollout_id = new_id()
    history = [{"role": "user", "content": _text(chance, words, 3_000)}]
    calls = []
    for i, (prompt, completion, lps) in enumerate(session(rng, TURNS, 1000, (40, 160), (20, 80))):
        history.append({"role": "user", "content": _text(chance, words, 400)})
        wire = Wire(
            "POST",
            "api.anthropic.com",
            "/v1/messages?beta=true",
            [*HEADERS, ("authorization", f"Bearer token-of-{rollout_id}")],
            json.dumps({"model": "claude", "messages": history, "system": system, "stream": True}).encode(),
            200,
            HEADERS[:8],
            _text(chance, words, 4_000).encode(),
            [100] * 40,
            [0.5 * k for k in range(40)],
        )
        upstream = {"messages": [{"role": "system", "content": system}, *history], "logprobs": True}
        calls.append(_call(rollout_id, i, prompt, completion, lps, wire, json.dumps(upstream).encode()))
    return calls


def _call(
    rollout_id: str,
    seq: int,
    prompt: list[int],
    completion: list[int],
    lps: list[float],
    wire: Wire,
    upstream_body: bytes = b"",
) -> ModelCall:
    return ModelCall(
        call_id=new_id(),
        rollout_id=rollout_id,
        seq=seq,
        dialect="anthropic",
        route="/v1/messages",
        status="ok",
        model_requested="claude",
        model_served="model",
        finish_reason="stop",
        policy_version="7",
        prompt_token_ids=TokenIds(",".join(map(str, prompt)).encode()),  # as an upstream hands them over
        completion_token_ids=completion,
        behaviour_logprobs=lps,
        usage=Usage(len(prompt), len(completion)),
        started_at=time.time(),
        ended_at=time.time() + 1,
        wire=wire,
        upstream_body=upstream_body,
    )


def _text(chance: random.Random, words: list[str], num_bytes: int) -> str:
    return " ".join(chance.choices(words, k=num_bytes * 2 // 15))


def record(path: Path, calls: list[ModelCall], in_flight: int) -> tuple[float, list[int], list[float]]:
    """Seconds until the last call is durable and the store is closed, calls per commit, latencies."""
    recorder = Recorder(path, flush_interval_s=0, on_alarm=sys.exit, share=False)
    recorder.open()
    assert recorder._hold is not None
    batches: list[int] = []
    writer = recorder._hold.writer
    commit = writer.commit

    def counting(batch: Batch) -> None:
        batches.append(len(batch.calls))
        commit(batch)

    writer.commit = counting  # type: ignore[method-assign]
    waiting: deque[tuple[float, Future[bool]]] = deque()
    latencies = []
    began = time.perf_counter()
    for call in calls:
        if len(waiting) == in_flight:
            at, future = waiting.popleft()
            assert future.result()
            latencies.append(time.perf_counter() - at)
        waiting.append((time.perf_counter(), recorder.call(call)))
    while waiting:
        assert waiting.popleft()[1].result()
    recorder.close()
    return time.perf_counter() - began, [n for n in batches if n], latencies


def final_rows(path: Path) -> pa.Table:
    """What the recorder has left in its file."""
    with schema.connect(path, read_only=True) as con:
        return con.execute("FROM call_rows ORDER BY rowid").to_arrow_table().combine_chunks()


def rows_as_received(calls: list[ModelCall]) -> pa.Table:
    """The calls' bulk as it came: whole prompts, whole bodies."""
    int_lists, real_lists = pa.list_(pa.int32()), pa.list_(pa.float32())
    return pa.table(
        {
            "call_id": [c.call_id for c in calls],
            "rollout_id": [c.rollout_id for c in calls],
            "prompt": pa.array([list(c.prompt_token_ids) for c in calls], int_lists),
            "completion": pa.array([c.completion_token_ids for c in calls], int_lists),
            "logprobs": pa.array([c.behaviour_logprobs for c in calls], real_lists),
            "request": pa.array([c.wire.request_body for c in calls], pa.large_binary()),
            "upstream": pa.array([c.upstream_body for c in calls], pa.large_binary()),
            "response": pa.array([c.wire.response_body for c in calls], pa.large_binary()),
        }
    )


def insert_raw(path: Path, create: str, table: pa.Table, batches: list[int]) -> float:
    """Seconds for DuckDB alone: `table` in `batches` into the table `raw` of `create`, and a checkpoint."""
    con = schema.connect(path)
    schema.migrate(con)
    con.execute(create)
    began = time.perf_counter()
    at = 0
    for n in batches:
        con.register("batch", table.slice(at, n))
        con.execute("INSERT INTO raw FROM batch")
        con.unregister("batch")
        at += n
    con.execute("CHECKPOINT store")
    con.close()
    return time.perf_counter() - began


def ingest(folder: Path, num_calls: int, in_flight: int, rounds: int) -> dict[str, float]:
    calls = ingest_calls(num_calls)
    received = rows_as_received(calls)
    ours, raw, as_received, latencies = [], [], [], []
    for i in range(rounds):
        path = folder / f"ours{i}.duckdb"
        seconds, batches, waited = record(path, calls, in_flight)
        ours.append(seconds)
        latencies += waited
        raw.append(insert_raw(folder / f"raw{i}.duckdb", SAME_TABLE, final_rows(path), batches))
        as_received.append(insert_raw(folder / f"received{i}.duckdb", BULK_TABLE, received, batches))
    wire = sum(len(c.wire.request_body) + len(c.wire.response_body) + len(c.upstream_body) for c in calls)
    return {
        "calls": num_calls,
        "mean_batch": round(num_calls / len(batches), 1),
        "recorder_calls_per_s": round(num_calls / statistics.median(ours)),
        "raw_calls_per_s": round(num_calls / statistics.median(raw)),
        "ratio": round(statistics.median(raw) / statistics.median(ours), 3),
        "as_received_calls_per_s": round(num_calls / statistics.median(as_received)),
        "ratio_to_as_received": round(statistics.median(as_received) / statistics.median(ours), 3),
        "latency_ms_p50": round(1e3 * float(np.median(latencies)), 1),
        "latency_ms_p99": round(1e3 * float(np.quantile(latencies, 0.99)), 1),
        "wire_bytes_per_call": round(wire / num_calls),
        "file_bytes_per_call": round(path.stat().st_size / num_calls),
    }


def size(folder: Path, num_sessions: int) -> dict[str, float]:
    """Bytes per new token of sessions of 50 turns: a coding harness's first prompt, then tool results.

    What an empty store weighs (its schema, in blocks of 32 KiB) is told apart.
    """
    rng = np.random.default_rng(1)
    path = folder / f"size{num_sessions}.duckdb"
    num_new = num_sampled = 0
    with Recorder(path, on_alarm=sys.exit, share=False) as recorder:
        for _ in range(num_sessions):
            rollout_id, length = new_id(), 0
            for i, (p, c, lps) in enumerate(session(rng, 50, 18_000, (200, 1600), (40, 300))):
                assert recorder.call(_call(rollout_id, i, p, c, lps, Wire())).result()
                num_new += len(p) + len(c) - length
                num_sampled += len(c)
                length = len(p) + len(c)
    with Recorder(folder / f"empty{num_sessions}.duckdb", on_alarm=sys.exit, share=False) as recorder:
        pass
    empty_bytes = recorder.path.stat().st_size
    num_bytes = path.stat().st_size
    return {
        "sessions": num_sessions,
        "new_tokens": num_new,
        "sampled_tokens": num_sampled,
        "file_bytes": num_bytes,
        "empty_file_bytes": empty_bytes,
        "bytes_per_new_token": round((num_bytes - empty_bytes) / num_new, 2),
        "bytes_per_new_token_with_empty_file": round(num_bytes / num_new, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=6400, help="calls per round")
    parser.add_argument("--in-flight", type=int, default=64, help="calls that wait for their commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where the files go; default a temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        result = {
            "ingest": ingest(folder, args.calls, args.in_flight, args.rounds),
            "size": [size(folder, 1), size(folder, 20)],
        }
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result["ingest"].items():
        print(f"{key:>24}  {value:,}")
    for figures in result["size"]:
        print(", ".join(f"{k} {v:,}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
