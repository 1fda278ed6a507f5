"""Written trajectories as packed arrays, a training batch at a time.

Token ids are unpacked by DuckDB (`unnest`) into flat columns, which is twice as fast as lists, and copied
once. New memory costs more than all of that where page faults are slow: with `reuse` a reader that is done
with a batch when it asks for the next one gets the same memory again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from polar_mitm.errors import StoreError
from polar_mitm.store.columns import lists_of
from polar_mitm.store.reader import StoreReader
from polar_mitm.store.rows import quote

_LISTED = "SELECT trajectory_no, trajectory_id, rollout_id, num_tokens, mask_runs FROM trajectory_rows"
_ROWS = 65_536  # fits into a CPU's second-level cache
_DAMAGED = "{}: its trajectories are damaged: `polar-mitm reconstruct --write` writes them again"


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """B trajectories one after the other, N tokens together, as variable-length attention takes them.

    `token_ids` [N] int32, `loss_mask` [N] uint8, `behaviour_logprobs` [N] float32 in nats (0.0 where masked);
    trajectory `i` is at `cu_seqlens[i] : cu_seqlens[i + 1]`, `cu_seqlens` [B + 1] int32.
    """

    trajectory_ids: tuple[str, ...]
    rollout_ids: tuple[str, ...]
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    behaviour_logprobs: NDArray[np.float32]
    cu_seqlens: NDArray[np.int32]


def packed_batches(
    reader: StoreReader,
    *,
    max_tokens: int,
    builder: str = "forest",
    rollout_ids: Sequence[str] | None = None,
    trained_only: bool = True,
    reuse: bool = False,
) -> Iterator[PackedBatch]:
    """The trajectories of a builder in batches of at most `max_tokens`, in the order they were written.

    A rollout that is incomplete is left out, also where it became so after its trajectories were written.

    Args:
        reader: an open store.
        max_tokens: N is at most this; nothing is cut or dropped to get there.
        builder: whose trajectories.
        rollout_ids: only these rollouts.
        trained_only: leave out trajectories in which no token trains.
        reuse: the arrays of a batch are valid until the next one is asked for.

    Raises:
        StoreError: the store cannot be read, its trajectories are damaged, or one is longer than a batch.
    """
    where = f"WHERE builder = {quote(builder)}"
    if rollout_ids is not None:
        where += f" AND rollout_id IN ({', '.join(map(quote, rollout_ids)) or 'NULL'})"
    if trained_only:
        where += " AND num_trained > 0"
    listed = reader.sql(f"{_LISTED} {where} ORDER BY trajectory_no").combine_chunks()
    holes = {rollout.rollout_id for rollout in reader.rollouts() if rollout.incomplete is not None}
    fit = [rollout_id not in holes for rollout_id in listed["rollout_id"].to_pylist()]
    listed = listed.filter(pa.array(fit, pa.bool_())).combine_chunks()
    ids, sizes = listed["trajectory_id"].to_pylist(), listed["num_tokens"].to_numpy().astype(np.int64)
    for row in np.flatnonzero(sizes > max_tokens)[:1]:
        raise StoreError(
            f"trajectory {ids[row]} has {sizes[row]} tokens, a batch {max_tokens}: "
            "`polar-mitm reconstruct --max-tokens` splits where calls end"
        )
    memory = _Memory()
    first = 0
    while first < len(ids):
        last = first + int(np.searchsorted(np.cumsum(sizes[first:]), max_tokens, "right"))
        if not reuse:
            memory = _Memory()
        yield _packed(reader, listed.slice(first, last - first), memory)
        first = last


def packed(reader: StoreReader, numbers: Sequence[int]) -> PackedBatch:
    """The trajectories with these `trajectory_no`, in the order of the numbers, whatever rollout they are of.

    Raises:
        StoreError: the store cannot be read, or its trajectories are damaged, or are no longer there.
    """
    wanted = np.unique(np.array(numbers, np.int64))
    listed = reader.sql(f"{_LISTED} WHERE {_among(wanted)} ORDER BY trajectory_no").combine_chunks()
    if len(listed) != wanted.size:
        raise StoreError(_DAMAGED.format(reader.path))
    return _packed(reader, listed, _Memory())


def _packed(reader: StoreReader, listed: pa.Table, memory: _Memory) -> PackedBatch:
    numbers, sizes = (listed[name].to_numpy().astype(np.int64) for name in ("trajectory_no", "num_tokens"))
    runs = lists_of(listed["mask_runs"], np.int32)
    cu_seqlens = np.zeros(len(listed) + 1, np.int32)
    np.cumsum(sizes, out=cu_seqlens[1:])
    pages = f"FROM trajectory_pages WHERE {_among(numbers)}"
    token_ids = memory.get("token_ids", int(cu_seqlens[-1]), np.int32)
    _read(reader, f"SELECT unnest(token_ids) {pages}", token_ids)
    train = _train(runs.values[runs.offsets[0] : runs.offsets[-1]], runs.lengths)
    if train.num_tokens != token_ids.size:
        raise StoreError(_DAMAGED.format(reader.path))
    trained = memory.get("trained", train.num_trained, np.float32)
    _read(reader, f"SELECT unnest(trained_logprobs) {pages}", trained)
    loss_mask, logprobs = _spread(train, trained, memory)
    ids, rollouts = (tuple(listed[name].to_pylist()) for name in ("trajectory_id", "rollout_id"))
    return PackedBatch(ids, rollouts, token_ids, loss_mask, logprobs, cu_seqlens)


def _among(numbers: NDArray[np.int64]) -> str:
    """A condition for trajectories by number, as few ranges as there are."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    ranges = zip(numbers[np.append(0, breaks)], numbers[np.append(breaks, 0) - 1], strict=True)
    return " OR ".join(f"trajectory_no BETWEEN {first} AND {last}" for first, last in ranges)


def _read(reader: StoreReader, query: str, out: NDArray[Any]) -> None:
    """Fill `out` with the one column of a query.

    Raises:
        StoreError: it has more or fewer values.
    """
    at = 0
    for batch in reader.stream(query, _ROWS):
        values = batch.column(0).to_numpy(zero_copy_only=False)
        if at + values.size > out.size:
            raise StoreError(_DAMAGED.format(reader.path))
        out[at : at + values.size] = values
        at += values.size
    if at < out.size:
        raise StoreError(_DAMAGED.format(reader.path))


class _Memory:
    """Arrays by name, kept as long as they are large enough."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def get(self, name: str, size: int, kind: Any) -> NDArray[Any]:
        """An array [size] with anything in it."""
        kept = self._arrays.get(name)
        if kept is None or kept.size < size:
            kept = self._arrays[name] = np.empty(size, kind)
        return kept[:size]


class _Train(NamedTuple):
    """Which tokens of a batch train: runs that end at `ends` and are `lengths` long."""

    num_tokens: int
    num_trained: int
    ends: list[int]
    lengths: list[int]


def _train(runs: NDArray[Any], num_runs: NDArray[np.int64]) -> _Train:
    """Out of runs that alternate within a trajectory, masked ones first."""
    ends = np.cumsum(runs, dtype=np.int64)
    within = np.arange(runs.size) - np.repeat(np.cumsum(num_runs) - num_runs, num_runs)
    train = within % 2 == 1
    lengths = runs[train]
    return _Train(int(runs.sum()), int(lengths.sum()), ends[train].tolist(), lengths.tolist())


def _spread(
    train: _Train, trained: NDArray[np.float32], memory: _Memory
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mask and logprobs of every token."""
    loss_mask = memory.get("loss_mask", train.num_tokens, np.uint8)
    logprobs = memory.get("logprobs", train.num_tokens, np.float32)
    loss_mask[:] = 0
    logprobs[:] = 0.0
    done = 0
    for end, length in zip(train.ends, train.lengths, strict=True):
        loss_mask[end - length : end] = 1
        logprobs[end - length : end] = trained[done : done + length]
        done += length
    return loss_mask, logprobs
