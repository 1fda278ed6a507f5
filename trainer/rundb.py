"""What a training run leaves: `run.duckdb` for questions, `metrics.jsonl` for `tail -f`. No torch here.

A DuckDB file that one process writes is closed to every other. So it is opened for each commit and let go
again: between steps anybody may read it. A commit that meets a reader waits a moment, and goes with the
next one where that is not enough.

    runs           one row per `train`, `rl` or `sft`
    snapshots      a training set: the query, and what it selected
    snapshot_rows  its trajectories
    steps          each optimiser step: what it was given, and the version of the weights that it made
    step_rows      the trajectories of a step, with the advantage and the loss weight of each
    metrics        one row per figure and step

A step's rows lead to the wire: `step_rows.rollout_id` to the store's calls and their bodies, and where the
store has `trajectories` (`polar-mitm reconstruct --write`), `step_rows.trajectory_id` to the exact spans.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from polar_mitm.errors import StoreError
from polar_mitm_trainer.samples import Sample

_TABLES = """
    CREATE TABLE IF NOT EXISTS runs (
        run_id VARCHAR NOT NULL, kind VARCHAR, name VARCHAR, config VARCHAR, store VARCHAR,
        started_at DOUBLE, ended_at DOUBLE, status VARCHAR
    );
    CREATE TABLE IF NOT EXISTS snapshots (
        snapshot_id VARCHAR NOT NULL, run_id VARCHAR, query VARCHAR, store VARCHAR, num_rows BIGINT,
        created_at DOUBLE
    );
    CREATE TABLE IF NOT EXISTS snapshot_rows (
        snapshot_id VARCHAR NOT NULL, trajectory_id VARCHAR, rollout_id VARCHAR
    );
    CREATE TABLE IF NOT EXISTS steps (
        run_id VARCHAR NOT NULL, step BIGINT NOT NULL, snapshot_id VARCHAR, policy_version VARCHAR,
        num_rollouts BIGINT, num_trained BIGINT, started_at DOUBLE, ended_at DOUBLE
    );
    CREATE TABLE IF NOT EXISTS step_rows (
        run_id VARCHAR NOT NULL, step BIGINT NOT NULL, trajectory_id VARCHAR, rollout_id VARCHAR,
        group_id VARCHAR, advantage DOUBLE, weight DOUBLE, num_trained BIGINT, policy_version VARCHAR
    );
    CREATE TABLE IF NOT EXISTS metrics (
        run_id VARCHAR NOT NULL, step BIGINT NOT NULL, name VARCHAR, value DOUBLE, "at" DOUBLE
    );
"""
_WAIT_S, _LAST_WAIT_S, _POLL_S = 0.2, 30.0, 0.02


@dataclass(frozen=True, slots=True)
class StepRow:
    """A trajectory's part in a step.

    `advantage` is the mean over its trained tokens, `weight` the sum of what their losses were multiplied
    by: what share of the step's loss was its own.
    """

    trajectory_id: str
    rollout_id: str
    group_id: str
    advantage: float
    weight: float
    num_trained: int
    policy_version: str | None


def step_rows(samples: Iterable[Sample]) -> list[StepRow]:
    """The rows of the samples that an optimiser step was given."""
    return [
        StepRow(
            each.trajectory_id,
            each.rollout_id,
            each.group_id,
            float(np.sum(each.advantages, dtype=np.float64) / max(each.num_trained, 1)),
            float(np.sum(each.weights, dtype=np.float64)),
            each.num_trained,
            each.policy_version,
        )
        for each in samples
    ]


class RunDB:
    """The database of one run, in its folder; other runs may be in it too.

    Raises:
        StoreError: on `begin`, `rewind` and `end`: the file cannot be written.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.path, self.run_id = folder / "run.duckdb", run_id
        self._log = folder / "metrics.jsonl"
        self._waiting: list[tuple[str, pa.Table]] = []

    @staticmethod
    def last_run(folder: Path) -> str:
        """The id of the run that was begun last in a folder.

        Raises:
            StoreError: there is none; or it cannot be read, as while somebody else writes.
        """
        return RunDB.recorded(folder)[0]

    @staticmethod
    def recorded(folder: Path) -> tuple[str, str, dict[str, Any]]:
        """The id, the kind and the configuration of the run that was begun last; raises as `last_run`."""
        path = folder / "run.duckdb"
        if not path.exists():
            raise StoreError(f"{folder} holds no run")
        with _connect(path, _LAST_WAIT_S, read_only=True) as con:
            query = "SELECT run_id, kind, config FROM runs ORDER BY started_at DESC LIMIT 1"
            try:
                found = con.execute(query).fetchone()
            except duckdb.CatalogException:
                found = None
        if found is None:
            raise StoreError(f"{folder} holds no run")
        return found[0], found[1], json.loads(found[2])

    def begin(self, kind: str, name: str, config: Mapping[str, Any], store: Path | None) -> None:
        """Make the tables and the run's own row; a run that is resumed keeps its first start."""
        with self._open(_LAST_WAIT_S) as con:
            con.execute(_TABLES)
            known = con.execute("SELECT 1 FROM runs WHERE run_id = ?", [self.run_id]).fetchone()
            if known:
                con.execute(
                    "UPDATE runs SET status = 'running', ended_at = NULL, config = ? WHERE run_id = ?",
                    [json.dumps(config, default=str), self.run_id],
                )
            else:
                row = [self.run_id, kind, name, json.dumps(config, default=str), str(store or "")]
                con.execute(
                    "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, NULL, 'running')", [*row, time.time()]
                )

    def snapshot(self, snapshot_id: str, query: str, store: Path, rows: Sequence[tuple[str, str]]) -> None:
        """Keep what a training set is: its (trajectory_id, rollout_id) in order; once."""
        with self._open(_LAST_WAIT_S) as con:
            if con.execute("SELECT 1 FROM snapshots WHERE snapshot_id = ?", [snapshot_id]).fetchone():
                return
            con.execute("BEGIN")
            row = [snapshot_id, self.run_id, query, str(store), len(rows), time.time()]
            con.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?)", row)
            _insert(
                con,
                "snapshot_rows",
                pa.table(
                    {
                        "snapshot_id": pa.array([snapshot_id] * len(rows), pa.string()),
                        "trajectory_id": pa.array([t for t, _ in rows], pa.string()),
                        "rollout_id": pa.array([r for _, r in rows], pa.string()),
                    }
                ),
            )
            con.execute("COMMIT")

    def rewind(self, step: int) -> None:
        """Forget what came after `step`: a run that is resumed there does it again."""
        self._waiting = []
        with self._open(_LAST_WAIT_S) as con:
            con.execute("BEGIN")
            for table in ("steps", "step_rows", "metrics"):
                con.execute(f"DELETE FROM {table} WHERE run_id = ? AND step > ?", [self.run_id, step])
            con.execute("COMMIT")
        if self._log.exists():
            partial = self._log.with_name(f".{self._log.name}.partial")
            with self._log.open() as lines, partial.open("w") as kept:
                kept.writelines(line for line in lines if not self._after(step, line))
            partial.replace(self._log)

    def _after(self, step: int, line: str) -> bool:
        """Is this line of the log of a later step, or cut short where its writer was killed?"""
        try:
            found = json.loads(line)
        except ValueError:
            return True
        return bool(found["run_id"] == self.run_id and found["step"] > step)

    def step(
        self,
        step: int,
        rows: Sequence[StepRow],
        metrics: Mapping[str, float],
        *,
        policy_version: str,
        started_at: float,
        snapshot_id: str | None = None,
    ) -> None:
        """Keep a step: what it was given, and what it came to. Does not fail while others read."""
        head = {
            "snapshot_id": [snapshot_id],
            "policy_version": [policy_version],
            "num_rollouts": [len({row.rollout_id for row in rows})],
            "num_trained": [sum(row.num_trained for row in rows)],
            "started_at": [started_at],
            "ended_at": [time.time()],
        }
        self._add("steps", step, pa.table(head))
        if rows:
            self._add("step_rows", step, pa.Table.from_pylist([asdict(row) for row in rows]))
        self.metrics(step, metrics)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep figures; NaN and infinity are kept as NULL."""
        now = time.time()
        values = {name: float(v) if math.isfinite(v) else None for name, v in metrics.items()}
        if values:
            columns = {
                "name": pa.array(list(values), pa.string()),
                "value": pa.array(list(values.values()), pa.float64()),
                "at": pa.array([now] * len(values), pa.float64()),
            }
            self._add("metrics", step, pa.table(columns))
            with self._log.open("a") as log:
                log.write(json.dumps({"run_id": self.run_id, "step": step, "at": now, **values}) + "\n")
        self._flush(_WAIT_S)

    def end(self, status: str) -> None:
        """Write what is left, and how the run ended."""
        self._flush(_LAST_WAIT_S)
        with self._open(_LAST_WAIT_S) as con:
            con.execute(
                "UPDATE runs SET status = ?, ended_at = ? WHERE run_id = ?",
                [status, time.time(), self.run_id],
            )

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps and values of one figure, as far as they are written."""
        with self._open(_LAST_WAIT_S) as con:
            found = con.execute(
                "SELECT step, value FROM metrics "
                "WHERE run_id = ? AND name = ? AND value IS NOT NULL ORDER BY step",
                [self.run_id, name],
            ).fetchall()
        return [step for step, _ in found], [value for _, value in found]

    def _add(self, table: str, step: int, rows: pa.Table) -> None:
        own = {
            "run_id": pa.array([self.run_id] * rows.num_rows, pa.string()),
            "step": pa.array([step] * rows.num_rows, pa.int64()),
        }
        for name, column in own.items():
            rows = rows.append_column(name, column)
        self._waiting.append((table, rows))

    def _flush(self, wait_s: float) -> None:
        """Commit what waits, all of it or nothing; it waits on where a reader holds the file."""
        try:
            con = self._open(wait_s)
        except StoreError:
            if wait_s == _LAST_WAIT_S:
                raise
            return
        with con:
            con.execute("BEGIN")
            for table, rows in self._waiting:
                _insert(con, table, rows)
            con.execute("COMMIT")
        self._waiting = []

    def _open(self, wait_s: float) -> duckdb.DuckDBPyConnection:
        return _connect(self.path, wait_s)


def _connect(path: Path, wait_s: float, *, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """Waits for whoever holds the file; the StoreError after that says who it is."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only)
        except duckdb.Error as error:
            if time.monotonic() > deadline:
                reason = str(error).splitlines()[0]
                how = "read" if read_only else "written"
                raise StoreError(f"{path} cannot be {how}: {reason}") from error
            time.sleep(_POLL_S)


def differences(then: Any, now: Any, key: str = "") -> list[str]:
    """What differs between a recorded configuration and one of now, as `KEY: THEN, now NOW`.

    Keys that only one of them has are of another version of this project, and passed over.
    """
    if isinstance(then, dict) and isinstance(now, dict):
        both = [name for name in then if name in now]
        return [d for name in both for d in differences(then[name], now[name], f"{key}.{name}".lstrip("."))]
    return [] if then == now else [f"{key}: {json.dumps(then)}, now {json.dumps(now)}"]


def _insert(con: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    con.register("new_rows", rows)
    con.execute(f"INSERT INTO {table} BY NAME FROM new_rows")
    con.unregister("new_rows")
