"""Opening a DuckDB file as a store: connection options, locks, numbered migrations."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import duckdb

from polar_mitm.errors import StoreError

# Checkpoints rewrite whole row groups: small ones keep that short.
_WRITABLE = "ROW_GROUP_SIZE 8192, STORAGE_VERSION 'v1.5.0'"
_OPTIONS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": False,  # nothing here may reach for the network
    "autoload_known_extensions": False,
    "checkpoint_threshold": "1TB",  # the recorder decides when
    "default_block_size": 32768,  # the smallest for which DuckDB bit-packs INTEGER
    "memory_limit": "2GB",
}
_MIGRATIONS = Path(__file__).with_name("migrations")
_LOCK_HOLDER = re.compile(r"\(PID (\d+)\)")


class StoreLocked(StoreError):
    """Another process has the file open for writing. `pid` is that process, where it is known."""

    def __init__(self, path: Path, pid: int | None) -> None:
        super().__init__(f"{path} is locked by {f'process {pid}' if pid else 'another process'}")
        self.pid = pid


class NotAStore(StoreError):
    """The file is no store that this version can use; trying again will not help."""


class Migration(NamedTuple):
    """One numbered step of the schema."""

    version: int
    name: str
    sql: str


def migrations(folder: Path = _MIGRATIONS) -> list[Migration]:
    """The steps in `folder`, files named `NNNN_name.sql`, in order."""
    return [
        Migration(int(p.stem[:4]), p.stem[5:], p.read_text("utf-8")) for p in sorted(folder.glob("*.sql"))
    ]


def connect(path: Path, *, read_only: bool = False, memory: str = "") -> duckdb.DuckDBPyConnection:
    """A connection of a new DuckDB instance whose default catalog is the store.

    `memory` bounds what DuckDB keeps of the file in memory and what queries take, such as `1GB`.

    Raises:
        StoreLocked: another process writes the file.
        NotAStore: the file is something else.
        StoreError: the file cannot be opened for another reason.
    """
    quoted = str(path).replace("'", "''")
    options = _OPTIONS | {"temp_directory": f"{path}.tmp"}
    if memory:
        options["memory_limit"] = memory
    if not read_only:
        options["threads"] = 1  # commits are small: hand-overs between threads would cost more than they save
    con = duckdb.connect(config=options)
    try:
        con.execute(f"ATTACH '{quoted}' AS store (TYPE duckdb, {'READ_ONLY' if read_only else _WRITABLE})")
        con.execute("USE store")
    except duckdb.Error as error:
        con.close()
        text = str(error).splitlines()[0]
        if "Could not set lock" in text:
            pid = _LOCK_HOLDER.search(text)
            raise StoreLocked(path, int(pid[1]) if pid else None) from error
        if "Unique file handle conflict" in text:
            raise StoreLocked(path, os.getpid()) from error
        if "not a valid DuckDB database" in text:
            raise NotAStore(f"{path} is not a DuckDB file") from error
        raise StoreError(f"{path} cannot be opened: {text}") from error
    return con


def lock_down(con: duckdb.DuckDBPyConnection) -> None:
    """No SQL on this instance reads another file or changes a setting from here on."""
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")


def version_of(con: duckdb.DuckDBPyConnection) -> int:
    """The schema version of the open store; 0 when it has no tables at all.

    Raises:
        NotAStore: it is somebody else's database.
    """
    tables = con.execute("SELECT table_name FROM duckdb_tables() WHERE database_name = 'store'").fetchall()
    if not tables:
        return 0
    if ("schema_migrations",) not in tables:
        raise NotAStore(f"{_path_of(con)} is a DuckDB database, but not a polar-mitm store")
    row = con.execute("SELECT coalesce(max(version), 0) FROM schema_migrations").fetchone()
    return int(row[0]) if row else 0


def check_version(con: duckdb.DuckDBPyConnection, steps: list[Migration] | None = None) -> int:
    """The store's schema version, refused with NotAStore when this program is too old for it."""
    found, known = version_of(con), (steps or migrations())[-1].version
    if found > known:
        raise NotAStore(
            f"{_path_of(con)} has schema {found}, newer than this polar-mitm knows ({known}): upgrade"
        )
    return found


def migrate(con: duckdb.DuckDBPyConnection, steps: list[Migration] | None = None) -> None:
    """Bring the open store up to the newest schema, all steps in one transaction.

    Raises:
        NotAStore: the store is newer than the newest step, or no store.
        StoreError: a step fails; the store is as it was.
    """
    steps = steps or migrations()
    found = check_version(con, steps)
    if found == steps[-1].version:
        return
    try:
        con.execute("BEGIN")
        con.execute("CREATE TABLE IF NOT EXISTS schema_migrations (version INTEGER, applied_at DOUBLE)")
        for step in steps:
            if step.version > found:
                con.execute(step.sql)
                con.execute("INSERT INTO schema_migrations VALUES (?, ?)", [step.version, time.time()])
        con.execute("COMMIT")
    except duckdb.Error as error:
        con.execute("ROLLBACK")
        raise StoreError(f"{_path_of(con)} cannot be migrated from schema {found}: {error}") from error


def _path_of(con: duckdb.DuckDBPyConnection) -> str:
    row = con.execute("SELECT path FROM duckdb_databases() WHERE database_name = 'store'").fetchone()
    return str(row[0]) if row else "the file"
