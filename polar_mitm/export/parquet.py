"""Trajectories and calls as Parquet files (zstd), for trainers and for any other reader.

The two schemas below are the contract: the file names the one it follows under the metadata key
`polar_mitm.schema`, and each column whose name does not say it all has a `doc`. Raw wire is not exported: it
holds people's prompts in full, and the store keeps it. A file appears under its name only when it is whole.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from polar_mitm.reconstruct import Trajectory
from polar_mitm.types import ModelCall

_TOKENS_PER_GROUP = 1 << 20  # a reader holds a whole group in memory
_ROWS_PER_GROUP = 4096
_LONG = ("token_ids", "prompt_token_ids", "prompt_ids", "completion_ids", "response_ids")
T = TypeVar("T")


def column(name: str, kind: Any, doc: str = "") -> Any:
    return pa.field(name, kind, metadata={"doc": doc} if doc else None)


IDS, LOGPROBS = pa.list_(pa.int32()), pa.list_(pa.float32())
_SPAN = pa.struct(
    [
        column("call_id", pa.string()),
        column("start", pa.int32(), "first token that the call's prompt added"),
        column("sampled_start", pa.int32(), "first sampled token"),
        column("end", pa.int32(), "one past the last sampled token"),
        column("mask_reason", pa.string(), "why its sampled tokens are masked here; null: they train"),
        column("truncated", pa.bool_(), "cancelled, or cut by length"),
        column("policy_version", pa.string()),
        column("policy_version_last", pa.string(), "its last token's, where weights changed inside the call"),
    ]
)
TRAJECTORIES = pa.schema(
    [
        column("trajectory_id", pa.string(), "the id of its last call; unique within a builder"),
        column("builder", pa.string(), "forest, per-request, polar-splice"),
        column("rollout_id", pa.string()),
        column("group_id", pa.string(), "the rollouts of one task under one policy"),
        column("role", pa.string(), "of its last call: main, subagent, auxiliary, compaction"),
        column("agent_id", pa.string(), "the sub-agent of its last call, where the harness names it"),
        column("num_tokens", pa.int32(), "T"),
        column("num_trained", pa.int32(), "the sum of loss_mask"),
        column("token_ids", IDS, "[T]"),
        column("loss_mask", pa.list_(pa.uint8()), "[T] 1 where a sampled token trains"),
        column("behaviour_logprobs", LOGPROBS, "[T] nats, as the engine gave them; 0.0 where masked"),
        column("policy_version_min", pa.string(), "over the spans that train"),
        column("policy_version_max", pa.string(), "over the spans that train"),
        column("spans", pa.list_(_SPAN), "the calls, root first; they tile 0..T"),
    ],
    metadata={"polar_mitm.schema": "trajectories/3"},
)
_SAMPLING = pa.struct(
    [
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("top_k", pa.int64()),
        ("max_tokens", pa.int64()),
        ("stop", pa.list_(pa.string())),
    ]
)
_USAGE = pa.struct(
    [(f"{kind}_tokens", pa.int64()) for kind in ("prompt", "completion", "cached", "reasoning")]
)
CALLS = pa.schema(
    [
        *(column(name, pa.string()) for name in ("call_id", "rollout_id")),
        column("seq", pa.int64(), "order of arrival within the rollout"),
        column("role", pa.string(), "main, subagent, auxiliary, compaction"),
        column("agent_id", pa.string(), "which sub-agent, where the harness names it"),
        column("status", pa.string(), "ok, cancelled, failed, refused"),
        column("parent_call_id", pa.string(), "recorded lineage; reconstruction goes by the ids"),
        *(column(n, pa.string()) for n in ("dialect", "route", "model_requested", "model_served")),
        column("stream", pa.bool_()),
        column("delivered", pa.bool_(), "the whole answer was handed to the harness"),
        *(column(name, pa.string()) for name in ("finish_reason", "error")),
        column("policy_version", pa.string(), "the engine's own word for its weights"),
        column("policy_version_last", pa.string(), "its last token's, where weights changed inside the call"),
        column("continuation", pa.string(), "exact: its prompt begins with its parent's own ids; none"),
        column("fallback", pa.string(), "why it is not exact"),
        column("edits", pa.list_(pa.string()), "harmless edits of the history that it was found in spite of"),
        column("replayed_from", pa.string(), "the recorded call of another rollout that was served"),
        column("tokenizer", pa.string(), "ids of different ones must not meet"),
        column("sampling_requested", _SAMPLING, "what the harness asked for"),
        column("sampling", _SAMPLING, "what the engine was told"),
        column("notes", pa.list_(pa.string()), "what translation left out on purpose"),
        column("prompt_token_ids", IDS, "[P]"),
        column("completion_token_ids", IDS, "[C]"),
        column("behaviour_logprobs", LOGPROBS, "[C] nats"),
        column("usage", _USAGE, "the engine's own count"),
        column("started_at", pa.float64(), "Unix seconds"),
        column("first_token_at", pa.float64(), "Unix seconds"),
        column("ended_at", pa.float64(), "Unix seconds"),
    ],
    metadata={"polar_mitm.schema": "calls/3"},
)


def export_trajectories(
    trajectories: Iterable[Trajectory],
    path: str | os.PathLike[str],
    *,
    builder: str = "forest",
    force: bool = False,
) -> int:
    """Write a builder's trajectories to `path` in the schema `TRAJECTORIES`; return how many.

    `trajectories` is read once, a few of them in memory at a time.

    Raises:
        FileExistsError: `path` exists and `force` is not set.
        OSError: the file cannot be written; what was at `path` before is still there.
    """
    return write(trajectories, partial(_trajectory_row, builder), TRAJECTORIES, Path(path), force)


def export_calls(calls: Iterable[ModelCall], path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Write calls to `path` in the schema `CALLS`; return how many. `calls` is read once, in pieces.

    Raises:
        FileExistsError: `path` exists and `force` is not set.
        OSError: the file cannot be written; what was at `path` before is still there.
    """
    return write(calls, _call_row, CALLS, Path(path), force)


def _trajectory_row(builder: str, trajectory: Trajectory) -> Mapping[str, Any]:
    row = {name: getattr(trajectory, name, None) for name in TRAJECTORIES.names}
    row |= {"builder": builder, "num_tokens": trajectory.token_ids.size}
    row["spans"] = [msgspec.structs.asdict(span) for span in trajectory.spans]
    return row


def _call_row(call: ModelCall) -> Mapping[str, Any]:
    row = {name: getattr(call, name) for name in CALLS.names}
    for name in ("sampling_requested", "sampling", "usage"):
        row[name] = msgspec.structs.asdict(row[name])
    return row


def _group(rows: Iterator[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The next rows, few enough to be held together."""
    group, num_tokens = [], 0
    for row in rows:
        group.append(row)
        num_tokens += sum(len(row.get(name, ())) for name in _LONG)
        if num_tokens >= _TOKENS_PER_GROUP or len(group) == _ROWS_PER_GROUP:
            break
    return group


def write(
    items: Iterable[T], to_row: Callable[[T], Mapping[str, Any]], schema: Any, path: Path, force: bool
) -> int:
    """Items as rows of a Parquet file; how many. Raises as `export_trajectories` does."""
    num_rows, rest = 0, iter(items)
    with appearing(path, force) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while rows := _group(map(to_row, rest)):
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            num_rows += len(rows)
    return num_rows


@contextmanager
def appearing(path: Path, force: bool) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when the block has ended well.

    Raises:
        FileExistsError: `path` exists and `force` is not set.
        OSError: the file cannot be written; what was at `path` before is still there.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists")
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
