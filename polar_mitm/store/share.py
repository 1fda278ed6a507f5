"""How other processes read a store while its recorder runs.

DuckDB lets one process write a file and none read it meanwhile. So the recorder's process serves SELECTs
through DuckDB's Quack extension on a localhost port, and a file next to the store says where:
`<store>.live.json` = {"pid", "uri", "token"}, mode 0600. Its `flock` is held as long as the recorder lives,
which tells a live file from one that a killed process left.

Quack: https://duckdb.org/docs/current/quack/reference. The extensions come from PyPI wheels and are loaded by
path, httpfs first: Quack's server and client need it for HTTP and random numbers.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import secrets
import socket
import time
from pathlib import Path

import duckdb
import msgspec

from polar_mitm.errors import StoreError

_PREFIX = "USE store;"
_ATTEMPTS = 5


class Live(msgspec.Struct):
    """The content of a discovery file. `uri` is None while nothing is served."""

    pid: int
    uri: str | None = None
    token: str = ""


def discovery_path(store: Path) -> Path:
    """Where the discovery file of a store is."""
    return store.with_name(store.name + ".live.json")


class Claim:
    """A recorder's hold on a store: the locked discovery file.

    Raises:
        BlockingIOError: a living recorder holds it.
        OSError: the file cannot be made.
    """

    def __init__(self, store: Path) -> None:
        self._path = discovery_path(store)
        while True:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._path.exists() and self._path.stat().st_ino == os.fstat(self._fd).st_ino:
                    break
            except OSError:
                os.close(self._fd)
                raise
            os.close(self._fd)  # its owner removed it between our open and our lock
        os.fchmod(self._fd, 0o600)
        self.publish(Live(os.getpid()))

    def publish(self, live: Live) -> None:
        """Replace what readers find."""
        text = msgspec.json.encode(live)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)

    def release(self) -> None:
        """Remove the file. Further calls do nothing."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def find_live(store: Path) -> Live | None:
    """Who records into `store` now; None when nobody does, whatever a dead process left behind."""
    try:
        fd = os.open(discovery_path(store), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pass
        for _ in range(_ATTEMPTS):
            try:
                return msgspec.json.decode(os.pread(fd, 4096, 0), type=Live)
            except msgspec.DecodeError:
                time.sleep(0.01)  # met it half written
        return None
    finally:
        os.close(fd)


def serve(con: duckdb.DuckDBPyConnection) -> Live:
    """Serve SELECTs on the instance of `con` from here on, to whoever knows the token.

    Raises:
        StoreError: the extensions are missing or do not load, or no port could be had.
    """
    token = secrets.token_hex(24)
    try:
        _load_extensions(con)
        # Only text that DuckDB itself parses as SELECT statements can be serialised to JSON. DuckDB runs this
        # for each query of each client.
        con.execute(
            "CREATE OR REPLACE MACRO memory.main.only_select(session, query) AS starts_with(query, "
            f"'{_PREFIX}') AND (json_serialize_sql(substr(query, {len(_PREFIX) + 1})) ->> 'error') = 'false'"
        )
        con.execute("SET GLOBAL quack_authorization_function = 'only_select'")
        for attempt in range(_ATTEMPTS):
            uri = f"quack:127.0.0.1:{_free_port()}"
            try:
                con.execute(f"CALL quack_serve('{uri}', token = '{token}')").fetchall()
                return Live(os.getpid(), uri, token)
            except duckdb.Error:
                if attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError("unreachable")
    except (duckdb.Error, OSError) as error:
        raise StoreError(f"live reading is off: {str(error).splitlines()[0]}") from error


def stop(con: duckdb.DuckDBPyConnection, live: Live) -> None:
    """Stop serving; clients in the middle of a query see an error."""
    con.execute(f"CALL quack_stop('{live.uri}')").fetchall()


def client() -> duckdb.DuckDBPyConnection:
    """A connection that `remote_select` can use.

    Raises:
        StoreError: the extensions are missing or do not load.
    """
    con = duckdb.connect(config={"autoinstall_known_extensions": False, "autoload_known_extensions": False})
    try:
        _load_extensions(con)
        # The environment's proxy must not see this traffic; only this client can be told so.
        con.execute("SET http_proxy = ''")
        con.execute("SET httpfs_client_implementation = 'httplib'")
    except (duckdb.Error, OSError) as error:
        con.close()
        raise StoreError(f"cannot read a store in use: {str(error).splitlines()[0]}") from error
    return con


def remote_select(con: duckdb.DuckDBPyConnection, live: Live, query: str) -> duckdb.DuckDBPyConnection:
    """Run `query` where the store is open."""
    return con.execute("FROM quack_query(?, ?, token := ?)", [live.uri, _PREFIX + query, live.token])


def _load_extensions(con: duckdb.DuckDBPyConnection) -> None:
    for name in ("httpfs", "quack"):
        try:
            folder = Path(next(iter(importlib.import_module(f"duckdb_extension_{name}").__path__)))
        except ImportError as error:
            raise OSError(f"the package duckdb-extension-{name} is not installed") from error
        path = folder / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        con.execute(f"LOAD '{str(path).replace(chr(39), chr(39) * 2)}'")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
