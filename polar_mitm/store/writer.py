"""The database side of a recorder: packed batches in, transactions out; no queues, no futures."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from polar_mitm.errors import StoreError
from polar_mitm.store import rows, schema
from polar_mitm.store.packing import CallPacker
from polar_mitm.types import EgressEvent, Reward, Rollout

_MAX_WAL_BYTES = 16 << 20  # a longer log is a longer pause when it is compacted

_SOURCES = {
    "new_rollouts": rows.ROLLOUT,
    "new_calls": rows.LOG,
    "new_rewards": rows.REWARD,
    "new_egress": rows.EGRESS,
}
_NEW = ", ".join(f"n.{c}" for c in rows.ROLLOUT)
_SET = ", ".join(f"{c} = n.{c}" for c in rows.ROLLOUT if c not in ("rollout_id", "incomplete"))
_MERGE = f"""
    MERGE INTO rollout_rows t USING new_rollouts n ON t.rollout_id = n.rollout_id
    WHEN MATCHED THEN UPDATE SET {{update}}incomplete = coalesce(t.incomplete, n.incomplete)
    WHEN NOT MATCHED THEN INSERT ({", ".join(rows.ROLLOUT)}) VALUES ({_NEW})
"""
_UPSERT = _MERGE.format(update=_SET + ", ")
_MARK = _MERGE.format(update="")
_INSERT_CALLS = "INSERT INTO call_log FROM new_calls"
_PREPARE_CALL = "PREPARE insert_call AS INSERT INTO call_log VALUES ($1)"
INTERRUPT = f"""
    UPDATE rollout_rows SET
        status = 'interrupted',
        stop_reason = {rows.quote(rows.KILLED_STOP_REASON)},
        incomplete = coalesce(incomplete, {rows.quote(rows.KILLED_INCOMPLETE)})
    WHERE status = 'running'
"""
_INSERT_REWARDS = "INSERT INTO rewards FROM new_rewards"
_INSERT_EGRESS = "INSERT INTO egress FROM new_egress"
_MOVE_CALLS = "INSERT INTO call_rows BY NAME FROM logged_calls"


class RolloutSealed(Exception):
    """A record of a rollout that `polar-mitm seal` has closed."""


class FileVanished(OSError):
    """The store's file is no longer at its path: what was stored in it is lost."""


@dataclass
class Batch:
    """What one transaction stores. `calls` are as logged; `marks` says why a rollout's record has holes."""

    rollouts: list[Rollout] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)
    egress: list[EgressEvent] = field(default_factory=list)
    marks: dict[str, str] = field(default_factory=dict)


class StoreWriter:
    """An open store, migrated to the newest schema. For one thread at a time.

    Args:
        path: the file.
        takeover: what runs in it was left by a killed capture, and is marked so.

    Raises:
        StoreLocked, NotAStore, StoreError, duckdb.Error: the file cannot be had for writing.
    """

    def __init__(self, path: Path, *, takeover: bool) -> None:
        self.path = path
        self.con = schema.connect(path)
        try:
            schema.migrate(self.con)
            if takeover:
                self.con.execute(INTERRUPT)
            self._sources = {name: rows.Source(columns) for name, columns in _SOURCES.items()}
            for name, source in self._sources.items():
                self.con.register(name, source)
            self.con.execute(_PREPARE_CALL)
            self.packer = CallPacker(self.con)
            self._sealed = {row[0] for row in self.con.execute("SELECT rollout_id FROM seals").fetchall()}
            found = self.con.execute("SELECT rollout_id FROM rollout_rows").fetchall()
            self.found = frozenset(row[0] for row in found)
            """The rollouts that were in it."""
        except (StoreError, duckdb.Error):
            self.con.close()
            raise
        self._wal = path.with_name(path.name + ".wal")
        self._inode = path.stat().st_ino

    def check_open(self, rollout_id: str) -> None:
        """Raises RolloutSealed where nothing may be added to a rollout any more."""
        if rollout_id in self._sealed:
            raise RolloutSealed(f"rollout {rollout_id} is sealed, and a record that came for it is not kept")

    def commit(self, batch: Batch) -> None:
        """Store a batch in one transaction; on return it is durable.

        Raises:
            FileVanished: the file was deleted; nothing that was ever stored in it is safe.
            duckdb.Error, OSError, ValueError, TypeError, OverflowError: nothing of the batch is stored.
        """
        # Updates of one row twice in a transaction conflict: the last word on a rollout is the only one.
        rollouts = {r.rollout_id: rows.rollout_row(r, batch.marks.get(r.rollout_id)) for r in batch.rollouts}
        marks = [
            rows.rollout_row(Rollout(rollout_id, started_at=time.time()), why)
            for rollout_id, why in batch.marks.items()
            if rollout_id not in rollouts and rollout_id not in self._sealed
        ]
        steps = [
            (_UPSERT, "new_rollouts", list(rollouts.values())),
            (_MARK, "new_rollouts", marks),
            (_INSERT_CALLS, "new_calls", [(call,) for call in batch.calls]),
            (_INSERT_REWARDS, "new_rewards", [rows.reward_row(r) for r in batch.rewards]),
            (_INSERT_EGRESS, "new_egress", [rows.egress_row(e) for e in batch.egress]),
        ]
        steps = [step for step in steps if step[2]]
        try:
            if len(steps) > 1:  # a single statement is a transaction
                self.con.execute("BEGIN")
            for sql, source, values in steps:
                if sql is _INSERT_CALLS and len(values) == 1:
                    # Much less than a scan costs; a parameter would have DuckDB look for pandas each time.
                    self.con.execute(f"EXECUTE insert_call({rows.quote(values[0][0])})")
                    continue
                self._sources[source].fill(values)
                self.con.execute(sql)
            if len(steps) > 1:
                self.con.execute("COMMIT")
        except BaseException:
            with suppress(duckdb.Error):  # a failed COMMIT has ended the transaction already
                self.con.execute("ROLLBACK")
            raise
        # A file that was deleted under us takes writes as if nothing had happened.
        found = _stat(self.path)
        if found is None or found.st_ino != self._inode:
            raise FileVanished(f"{self.path} was deleted or replaced while in use")

    def compact(self, *, force: bool = False) -> None:
        """Move the logged calls to their packed table and checkpoint, once the log is long.

        Raises:
            duckdb.Error, OSError: the connection may be unusable; everything committed is safe.
        """
        wal = None if force else _stat(self._wal)
        if not force and (wal is None or wal.st_size < _MAX_WAL_BYTES):
            return
        self.con.execute("BEGIN")
        self.con.execute(_MOVE_CALLS)
        self.con.execute("DELETE FROM call_log")
        self.con.execute("COMMIT")
        self.con.execute("CHECKPOINT store")

    def usable(self) -> bool:
        """Whether the connection survived the last failure."""
        try:
            self.con.execute("SELECT 1 FROM call_log LIMIT 1").fetchall()
        except duckdb.Error:
            return False
        return True

    def close(self) -> None:
        """Close without a word; what was committed stays."""
        with suppress(duckdb.Error):
            self.con.close()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
