"""Trajectories and the accounts of builds as tables: what `polar-mitm reconstruct --write` leaves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polar_mitm.errors import StoreError
from polar_mitm.store.offline import Changes, Selects
from polar_mitm.store.rows import quote

_MAX_TOKENS = 4 << 20  # of what is inserted at once
_PAGE = 512
_IDS = pa.list_(pa.int32())
_ROWS = pa.schema(
    [
        ("trajectory_no", pa.int64()),
        *((n, pa.string()) for n in ("trajectory_id", "rollout_id", "group_id", "builder", "role")),
        *((n, pa.int32()) for n in ("num_tokens", "num_trained")),
        ("mask_runs", _IDS),
        *((n, pa.string()) for n in ("spans", "policy_version_min", "policy_version_max")),
        ("built_at", pa.float64()),
        ("agent_id", pa.string()),
    ]
)


class BuiltTrajectory(Protocol):
    """What a trajectory must have to become a row: reconstruction's has it."""

    @property
    def trajectory_id(self) -> str: ...
    @property
    def rollout_id(self) -> str: ...
    @property
    def group_id(self) -> str | None: ...
    @property
    def role(self) -> str: ...
    @property
    def token_ids(self) -> NDArray[np.int32]: ...
    @property
    def loss_mask(self) -> NDArray[np.uint8]: ...
    @property
    def behaviour_logprobs(self) -> NDArray[np.float32]: ...
    @property
    def spans(self) -> Sequence[object]: ...
    @property
    def policy_version_min(self) -> str | None: ...
    @property
    def policy_version_max(self) -> str | None: ...
    @property
    def agent_id(self) -> str | None: ...


class StoredSpan(msgspec.Struct, frozen=True):
    """Where a call lies in a stored trajectory, as in `reconstruct.CallSpan`."""

    call_id: str
    start: int
    sampled_start: int
    end: int
    mask_reason: str | None = None
    truncated: bool = False
    policy_version: str | None = None
    policy_version_last: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StoredTrajectory:
    """A trajectory out of the table; its arrays [T] are int32, uint8 and float32."""

    trajectory_id: str
    rollout_id: str
    group_id: str | None
    role: str
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    behaviour_logprobs: NDArray[np.float32]
    spans: tuple[StoredSpan, ...]
    policy_version_min: str | None
    policy_version_max: str | None
    agent_id: str | None = None


def stored_trajectories(reader: Selects, rollout_id: str, builder: str) -> Iterator[StoredTrajectory]:
    """What was written of a builder's trajectories of one rollout, in that order, one in memory at a time.

    Raises:
        StoreError: the store cannot be read, or a trajectory in it is damaged.
    """
    found = reader.sql(
        "SELECT * EXCLUDE (builder, num_trained, built_at) FROM trajectory_rows "
        f"WHERE rollout_id = {quote(rollout_id)} AND builder = {quote(builder)} ORDER BY trajectory_no"
    )
    for row in found.to_pylist():
        pages = reader.sql(
            f"FROM trajectory_pages WHERE trajectory_no = {row.pop('trajectory_no')} ORDER BY page"
        ).combine_chunks()
        ids, trained = (_flat(pages[name]) for name in ("token_ids", "trained_logprobs"))
        try:
            runs = np.array(row.pop("mask_runs"), np.int64)
            mask = np.repeat(np.arange(runs.size, dtype=np.uint8) % 2, runs)
            logprobs = np.zeros(mask.size, np.float32)
            logprobs[mask == 1] = trained
            spans = msgspec.json.decode(row.pop("spans"), type=tuple[StoredSpan, ...])
            if not ids.size == mask.size == row.pop("num_tokens"):
                raise ValueError("lengths differ")
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"trajectory {row['trajectory_id']} is damaged: `polar-mitm reconstruct --write` "
                "writes it again"
            ) from error
        yield StoredTrajectory(token_ids=ids, loss_mask=mask, behaviour_logprobs=logprobs, spans=spans, **row)


class TrajectoryWriter:
    """Stores what one builder makes of some rollouts, instead of what it made of them before.

    Raises:
        duckdb.Error: from any method: it cannot be written.
    """

    def __init__(self, store: Changes, builder: str, rollout_ids: Sequence[str]) -> None:
        self._con = store.con
        self._builder = builder
        self._now = time.time()
        self._rows: list[tuple[Any, ...]] = []
        self._pages: list[pa.RecordBatch] = []
        self._num_tokens = 0
        self._con.register("rebuilt", pa.table({"rollout_id": pa.array(rollout_ids, pa.string())}))
        rebuilt = f"builder = {quote(builder)} AND rollout_id IN (FROM rebuilt)"
        self._con.execute(
            "DELETE FROM trajectory_pages WHERE trajectory_no IN "
            f"(SELECT trajectory_no FROM trajectory_rows WHERE {rebuilt})"
        )
        self._con.execute(f"DELETE FROM trajectory_rows WHERE {rebuilt}")
        self._con.execute(f"DELETE FROM builds WHERE {rebuilt}")
        self._con.unregister("rebuilt")
        last = self._con.execute("SELECT coalesce(max(trajectory_no), -1) FROM trajectory_rows").fetchone()
        self._next = 1 + (last[0] if last else -1)

    def write(self, rollout_id: str, trajectories: Iterable[BuiltTrajectory], report: object) -> None:
        """Store one rollout's trajectories and account, which is anything that msgspec encodes."""
        for each in trajectories:
            self._rows.append(self._row(each))
            self._pages.append(_pages(self._next, each))
            self._next += 1
            self._num_tokens += each.token_ids.size
            if self._num_tokens > _MAX_TOKENS:
                self.flush()
        text = msgspec.json.encode(report).decode()
        build = [rollout_id, self._builder, text, self._now]
        self._con.execute("INSERT INTO builds VALUES (?, ?, ?, ?)", build)

    def flush(self) -> None:
        """Insert what is held back; to be called at the end."""
        if not self._rows:
            return
        columns = zip(*self._rows, strict=True)
        arrays = [
            _list_array(values) if field.type == _IDS else pa.array(values, field.type)
            for values, field in zip(columns, _ROWS, strict=True)
        ]
        for name, table in (
            ("trajectory_rows", pa.Table.from_arrays(arrays, schema=_ROWS)),
            ("trajectory_pages", pa.Table.from_batches(self._pages)),
        ):
            self._con.register("new_trajectories", table)
            self._con.execute(f"INSERT INTO {name} BY NAME FROM new_trajectories")
            self._con.unregister("new_trajectories")
        self._rows, self._pages, self._num_tokens = [], [], 0

    def _row(self, one: BuiltTrajectory) -> tuple[Any, ...]:
        return (
            self._next,
            one.trajectory_id,
            one.rollout_id,
            one.group_id,
            self._builder,
            one.role,
            one.token_ids.size,
            int(one.loss_mask.sum()),
            mask_runs(one.loss_mask),
            msgspec.json.encode(one.spans).decode(),
            one.policy_version_min,
            one.policy_version_max,
            self._now,
            one.agent_id,
        )


def mask_runs(loss_mask: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The lengths of the runs of equal values in a mask [T], the first one of zeros, which may be empty."""
    edges = np.flatnonzero(np.diff(loss_mask, prepend=np.uint8(0)))
    return np.diff(edges, prepend=0, append=loss_mask.size).astype(np.int32)


def _flat(column: pa.ChunkedArray) -> NDArray[Any]:
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, np.int32)


def _pages(number: int, one: BuiltTrajectory) -> pa.RecordBatch:
    """A trajectory's tokens, `_PAGE` of them per row."""
    train = one.loss_mask.view(np.bool_)
    starts = np.append(np.arange(0, one.token_ids.size, _PAGE, dtype=np.int32), np.int32(one.token_ids.size))
    trained_starts = np.concatenate([[0], np.cumsum(train)])[starts].astype(np.int32)
    return pa.RecordBatch.from_pydict(
        {
            "trajectory_no": np.full(starts.size - 1, number),
            "page": np.arange(starts.size - 1, dtype=np.int32),
            "token_ids": pa.ListArray.from_arrays(starts, pa.array(one.token_ids)),
            "trained_logprobs": pa.ListArray.from_arrays(
                trained_starts, pa.array(one.behaviour_logprobs[train], pa.float32())
            ),
        }
    )


def _list_array(values: Sequence[NDArray[np.int32]]) -> pa.Array:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([v.size for v in values], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)))
