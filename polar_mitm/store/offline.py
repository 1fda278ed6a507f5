"""A store that nobody records into, open for changes: trajectories and seals are written so, never calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import duckdb
import pyarrow as pa

from polar_mitm.errors import StoreError
from polar_mitm.store import schema, share
from polar_mitm.store.writer import INTERRUPT


class Selects(Protocol):
    """What answers a SELECT: a `StoreReader`, or `Changes`."""

    def sql(self, query: str, /) -> pa.Table: ...


class Changes:
    """A store that is being changed over `con`; it answers SELECTs as a reader does."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self.con = con
        self.discarded = False

    def discard(self) -> None:
        """Leave the store as it was, whatever has been written."""
        self.discarded = True

    def sql(self, query: str, /) -> pa.Table:
        """The result of a SELECT, changes included. Raises duckdb.Error."""
        return self.con.execute(query).to_arrow_table()


@contextmanager
def writing(path: Path) -> Iterator[Changes]:
    """The store in one transaction, which ends with the block; meanwhile no capture starts.

    What a killed capture left running in it becomes interrupted, as when a capture opens it.

    Raises:
        StoreError: there is no such store, a capture writes it, a reader has it open, or a write fails.
    """
    path = path.resolve()
    if not path.exists():
        raise StoreError(f"there is no store {path}")
    try:
        claim = share.Claim(path)
    except BlockingIOError as error:
        live = share.find_live(path)
        by = f"process {live.pid}" if live else "another process"
        raise StoreError(f"{by} records into {path}: it can be changed once that has stopped") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    try:
        con = schema.connect(path)
        try:
            schema.migrate(con)
            con.execute("BEGIN")
            con.execute(INTERRUPT)
            changes = Changes(con)
            yield changes
            con.execute("ROLLBACK" if changes.discarded else "COMMIT")
            con.execute("CHECKPOINT store")
        except duckdb.Error as error:
            raise StoreError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
        finally:
            con.close()
    finally:
        claim.release()
