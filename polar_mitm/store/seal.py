"""Seals: a digest over everything that is recorded of a rollout, and which record broke it.

A record's digest is SHA-256 of its stored columns as MessagePack (lists as little-endian int32 or float32).
Each row of a seal has the digest of one record and of the chain up to it:

    chain(0) = SHA-256("polar-mitm seal 1" + rollout id + kind + id + digest of record 0)
    chain(n) = SHA-256(chain(n - 1) + kind + id + digest of record n)

in the order: rollout, calls as requested, rewards, egress, and an end that counts them. The last chain is the
seal's digest. Who can write the file can also seal it anew: kept elsewhere, the digest tells that too.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from polar_mitm.errors import StoreError
from polar_mitm.store.offline import Selects, writing
from polar_mitm.store.rows import quote

_SEED = "polar-mitm seal 1"
# What this version of the seal covers. A column that a later schema adds needs a later version.
_ROLLOUT = (
    "rollout_id group_id task_id sample_index harness harness_version command status stop_reason exit_code "
    "incomplete engine model started_at ended_at keep_reasoning forked_from"
)
_CALL = (
    "call_id rollout_id seq dialect route status model_requested model_served role parent_call_id stream "
    "delivered finish_reason error policy_version sampling_requested sampling notes usage started_at "
    "first_token_at ended_at num_prompt prompt_parent_id prompt_shared http body_base_id request_body "
    "upstream_body response_body pacing lineage answer prompt_suffix completion_token_ids behaviour_logprobs"
)
_REWARD = "rollout_id name value verifier evidence at"
_EGRESS = "rollout_id at verdict layer name detail"

RecordKind = Literal["rollout", "call", "reward", "egress", "end"]
FaultKind = Literal[
    "unsealed",  # there is no seal
    "changed",  # the record is not what was sealed
    "removed",  # it is gone
    "added",  # it was not there
    "seal_changed",  # the seal's own row is not what was written
    "other_seal",  # the rollout was sealed again: the digest is not the one that was kept
]


class _Table(NamedTuple):
    kind: RecordKind
    name: str
    columns: list[str]
    id_column: str
    order: str


_TABLES = (
    _Table("rollout", "rollout_rows", _ROLLOUT.split(), "rollout_id", "started_at"),
    _Table("call", "stored_calls", _CALL.split(), "call_id", "seq, call_id, started_at"),
    _Table("reward", "rewards", _REWARD.split(), "name", '"at", name, verifier, value, evidence'),
    _Table("egress", "egress", _EGRESS.split(), "name", '"at", verdict, layer, name, detail'),
)


class _Record(NamedTuple):
    kind: str
    record_id: str
    digest: str


@dataclass(frozen=True, slots=True)
class Seal:
    """A rollout's seal over `num_records` records. `digest` is worth keeping outside of the store."""

    rollout_id: str
    digest: str
    num_records: int
    sealed_at: float


@dataclass(frozen=True, slots=True)
class SealFault:
    """The first record that is not as it was sealed. `position` counts from 0, the rollout itself."""

    what: FaultKind
    kind: RecordKind | None = None
    record_id: str = ""
    position: int | None = None

    def __str__(self) -> str:
        if self.what == "unsealed":
            return "it was never sealed"
        if self.what == "other_seal":
            return "it was sealed again: its seal is not the one expected"
        record = "the end of the record" if self.kind == "end" else f"{self.kind} {self.record_id}"
        return (
            f"the seal of {record} was changed"
            if self.what == "seal_changed"
            else f"{record} was {self.what}"
        )


@dataclass(frozen=True, slots=True)
class SealCheck:
    """What `verify_seal` found; `fault` is None where every record is as it was sealed."""

    rollout_id: str
    seal: Seal | None
    fault: SealFault | None

    @property
    def ok(self) -> bool:
        """Whether the seal holds."""
        return self.fault is None


def seal_rollout(path: Path, rollout_id: str) -> Seal:
    """Seal a rollout of the store at `path`; nobody may be recording into it. What is sealed stays as it is.

    Raises:
        StoreError: there is no such rollout, it is sealed, or the store cannot be written.
    """
    with writing(path) as store:
        if seals(store, rollout_id):
            raise StoreError(f"rollout {rollout_id} is sealed already: `polar-mitm verify --seal` checks it")
        records = list(_records(store, rollout_id))
        if records[0].kind != "rollout":
            raise StoreError(f"{path} has no rollout {rollout_id}")
        now, chains = time.time(), _chains(rollout_id, records)
        store.con.executemany(
            "INSERT INTO seals VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(rollout_id, n, *r, c, now) for n, (r, c) in enumerate(zip(records, chains, strict=True))],
        )
    return Seal(rollout_id, chains[-1], len(records) - 1, now)


def seals(reader: Selects, rollout_id: str | None = None) -> list[Seal]:
    """The seals of a store, or of one rollout, oldest first.

    Raises:
        StoreError: the store cannot be read.
    """
    where = "" if rollout_id is None else f"WHERE rollout_id = {quote(rollout_id)}"
    found = reader.sql(
        "SELECT rollout_id, arg_max(chain, position) AS digest, count(*) - 1 AS num_records, "
        f"max(sealed_at) AS sealed_at FROM seals {where} GROUP BY rollout_id ORDER BY sealed_at, rollout_id"
    )
    return [Seal(**row) for row in found.to_pylist()]


def verify_seal(reader: Selects, rollout_id: str, expected: str | None = None) -> SealCheck:
    """Compare a rollout with its seal, and name the first record that is not as it was.

    Args:
        reader: an open store.
        rollout_id: the rollout.
        expected: the digest that sealing gave, where it was kept: a new seal does not pass for it.

    Raises:
        StoreError: the store cannot be read.
    """
    found = seals(reader, rollout_id)
    if not found:
        return SealCheck(rollout_id, None, SealFault("unsealed"))
    rows = reader.sql(f"FROM seals WHERE rollout_id = {quote(rollout_id)} ORDER BY position").to_pylist()
    sealed = [_Record(row["kind"], row["record_id"], row["digest"]) for row in rows]
    fault = _first_fault(sealed, list(_records(reader, rollout_id)))
    for position, (row, chain) in enumerate(zip(rows, _chains(rollout_id, sealed), strict=True)):
        if fault and fault.position is not None and fault.position < position:
            break
        if row["position"] != position or row["chain"] != chain:
            fault = SealFault("seal_changed", row["kind"], row["record_id"], position)
            break
    if fault is None and expected is not None and found[0].digest != expected.strip().lower():
        fault = SealFault("other_seal")
    return SealCheck(rollout_id, found[0], fault)


def _records(reader: Selects, rollout_id: str) -> Iterator[_Record]:
    num_records = 0
    for table in _TABLES:
        columns = ", ".join(f'"{name}"' for name in table.columns)
        found = reader.sql(
            f"SELECT {columns} FROM {table.name} WHERE rollout_id = {quote(rollout_id)} "
            f"ORDER BY {table.order}"
        )
        for batch in found.to_batches(max_chunksize=64):
            values = [_values(column) for column in batch.columns]
            ids = values[table.columns.index(table.id_column)]
            for record_id, row in zip(ids, zip(*values, strict=True), strict=True):
                digest = hashlib.sha256(msgspec.msgpack.encode(row)).hexdigest()
                yield _Record(table.kind, str(record_id), digest)
                num_records += 1
    yield _Record("end", "", hashlib.sha256(b"%d" % num_records).hexdigest())


def _values(column: pa.Array) -> list[Any]:
    """A column as what MessagePack can hold, whichever of a call's two tables it comes from."""
    kind = column.type
    if pa.types.is_list(kind):
        dtype = "<f4" if pa.types.is_floating(kind.value_type) else "<i4"
        return [_list(v.values, dtype) for v in column]
    if pa.types.is_floating(kind):
        return [None if v is None else v + 0.0 for v in column.to_pylist()]
    return list(column.to_pylist())


def _list(values: pa.Array | None, dtype: str) -> Any:
    if values is None or values.null_count:  # no recorder writes a NULL: it must not pass for a number
        return values if values is None else values.to_pylist()
    return _plain(np.asarray(values, dtype)).tobytes()


def _plain(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Without what DuckDB's float compression does not keep: -0.0, and which NaN it was."""
    if values.dtype.kind != "f":
        return values
    values = values + np.float32(0)
    values[np.isnan(values)] = np.nan
    return values


def _chains(rollout_id: str, records: Sequence[_Record]) -> list[str]:
    chains, last = [], _SEED + rollout_id
    for record in records:
        last = hashlib.sha256("\0".join((last, *record)).encode()).hexdigest()
        chains.append(last)
    return chains


def _first_fault(sealed: list[_Record], found: list[_Record]) -> SealFault | None:
    for position, (was, now) in enumerate(zip(sealed, found, strict=False)):
        if was == now:
            continue
        later_found = {r[:2]: r for r in found[position:]}
        later_sealed = {r[:2]: r for r in sealed[position:]}
        what: FaultKind
        if was[:2] not in later_found:
            what, record = "removed", was
        elif now[:2] not in later_sealed:
            what, record = "added", now
        elif later_found[was[:2]] != was:
            what, record = "changed", was
        else:  # it is as it was, but another took its place
            what, record = "changed", now
        return _fault(what, record, position)
    if len(sealed) > len(found):
        return _fault("removed", sealed[len(found)], len(found))
    if len(found) > len(sealed):
        return _fault("added", found[len(sealed)], len(sealed))
    return None


def _fault(what: FaultKind, record: _Record, position: int) -> SealFault:
    kind: RecordKind = record.kind  # type: ignore[assignment]
    return SealFault(what, kind, record.record_id, position)
