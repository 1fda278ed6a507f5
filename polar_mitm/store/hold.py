"""A recorder's hold on one file: the claim against other recorders, the open store, and the sharing of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import duckdb

from polar_mitm.errors import StoreError
from polar_mitm.store import share as sharing
from polar_mitm.store.schema import StoreLocked, lock_down
from polar_mitm.store.writer import StoreWriter

_POLL_S = 0.02


class Hold:
    """The store at `path`, opened for writing, its folder made where missing.

    Args:
        path: the file.
        wait_s: how long another process that has the file may take to let go.
        takeover: what runs in it was left by a killed capture, and is marked so.
        share: let other processes read; this takes a moment, and `on_alarm` hears when it does not work.

    Raises:
        NotAStore: the file is something else, or newer.
        StoreError, OSError, duckdb.Error: it cannot be had.
    """

    def __init__(
        self, path: Path, wait_s: float, *, takeover: bool, share: bool, on_alarm: Callable[[str], None]
    ) -> None:
        self._on_alarm = on_alarm
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                self._claim = sharing.Claim(path)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    live = sharing.find_live(path)
                    raise StoreLocked(path, live.pid if live else None) from error
                time.sleep(_POLL_S)
        try:
            self.writer = _open(path, deadline, takeover)
        except BaseException:
            self._claim.release()
            raise
        self._live: sharing.Live | None = None
        self._sharer: threading.Thread | None = None
        if share:
            # Loading the extensions takes 0.1 s, which nobody waits for.
            con = self.writer.con.cursor()
            self._sharer = threading.Thread(
                target=self._serve, args=(con,), name="polar-mitm-share", daemon=True
            )
            self._sharer.start()
        else:
            lock_down(self.writer.con)

    def release(self) -> None:
        """Stop serving, close the file, withdraw the claim."""
        if self._sharer:
            self._sharer.join()
        if self._live:
            with suppress(duckdb.Error):  # an unusable database serves nobody
                sharing.stop(self.writer.con, self._live)
        self.writer.close()
        self._claim.release()

    def _serve(self, con: duckdb.DuckDBPyConnection) -> None:
        try:
            self._live = sharing.serve(con)
            self._claim.publish(self._live)
        except (StoreError, OSError) as error:
            self._on_alarm(str(error))
        try:
            lock_down(con)
        except duckdb.Error as error:
            self._on_alarm(f"the store's settings could not be locked: {error}")


def _open(path: Path, deadline: float, takeover: bool) -> StoreWriter:
    while True:
        try:
            return StoreWriter(path, takeover=takeover)
        except StoreLocked:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_POLL_S)
