"""Reading a store: from its file, or through its recorder's process while that runs."""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from polar_mitm.errors import StoreError
from polar_mitm.store import rows, schema, share
from polar_mitm.store.bodies import unpack
from polar_mitm.store.chains import Link, whole_prompt
from polar_mitm.types import EgressEvent, Message, ModelCall, Reward, Rollout

_SHARE_WAIT_S = 3.0
_POLL_S = 0.02
LOST_RECORD = "its own record is missing"
TWO_RECORDS = "two records claim to be this rollout"
_LOST = """
    SELECT rollout_id, coalesce(min(started_at), 0.0) AS started_at FROM (
        SELECT rollout_id, started_at FROM stored_calls UNION ALL SELECT rollout_id, sealed_at FROM seals
    ) ANTI JOIN rollout_rows USING (rollout_id) GROUP BY rollout_id
"""
_SMALL, _LARGE = "256MB", "4GB"  # DuckDB fills what it may; where that does not do, it may have more


class _File:
    """The file itself, brought to the newest schema first."""

    def __init__(self, path: Path, memory: str) -> None:
        self.con = schema.connect(path, read_only=True, memory=memory)
        try:
            if schema.check_version(self.con) < schema.migrations()[-1].version:
                self.con.close()
                with schema.connect(path) as con:
                    schema.migrate(con)
                self.con = schema.connect(path, read_only=True, memory=memory)
            schema.lock_down(self.con)
        except BaseException:
            self.con.close()
            raise

    def select(self, query: str) -> pa.Table:
        return self.con.execute(query).to_arrow_table()

    def stream(self, query: str, rows: int) -> pa.RecordBatchReader:
        con = self.con.cursor()  # one connection has one result at a time
        con.execute("USE store")
        return con.execute(query).to_arrow_reader(rows)


class _Remote:
    """The process that records."""

    def __init__(self, live: share.Live) -> None:
        self._live = live
        self.con = share.client()

    def select(self, query: str) -> pa.Table:
        return share.remote_select(self.con, self._live, query).to_arrow_table()

    def stream(self, query: str, rows: int) -> pa.RecordBatchReader:
        return share.remote_select(self.con.cursor(), self._live, query).to_arrow_reader(rows)


def open_reader(path: Path) -> StoreReader:
    """A reader of the store at `path`, whether a capture is writing it now or not.

    An older store is brought to the newest schema first. While a reader has the file itself open, no recorder
    can open it: close readers that are not in use.

    Raises:
        StoreError: no such file, no store, newer than this program, or locked by one that does not share.
    """
    reader = StoreReader(path.resolve())
    try:
        reader.connect()
    except BaseException:
        reader.close()
        raise
    return reader


class StoreReader:
    """SELECTs on one store, and its records as structs; not for two threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.schema_version = 0
        self._source: _File | _Remote | None = None

    def connect(self) -> None:
        """Find the way to the store. Raises StoreError as `open_reader` does."""
        deadline = time.monotonic() + _SHARE_WAIT_S
        while True:
            try:
                self._source = self._find()
                break
            except schema.StoreLocked:
                # A recorder that is starting or ending has the file, but serves nobody.
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_POLL_S)
        version = self._source.select("SELECT max(version) AS version FROM schema_migrations")
        self.schema_version = version["version"][0].as_py()

    def sql(self, query: str) -> pa.Table:
        """The result of one SELECT over the views `calls`, `calls_full`, `wire`, `rollouts`, ... as Arrow.

        Raises:
            StoreError: not one SELECT statement, or an error in it.
        """
        if self._source is None:
            raise StoreError("the reader is closed")
        try:
            statements = self._source.con.extract_statements(query)
        except duckdb.Error as error:
            raise StoreError(str(error)) from error
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise StoreError("only a single SELECT can be run on a store")
        return self._select(statements[0].query)

    def stream(self, query: str, rows_per_batch: int = 65_536) -> Iterator[pa.RecordBatch]:
        """The result of one SELECT piece by piece, for what need not be in memory as a whole.

        Raises:
            StoreError: an error in it, or the store ends to be readable meanwhile.
        """
        if self._source is None:
            raise StoreError("the reader is closed")
        try:
            yield from self._source.stream(query, rows_per_batch)
        except (duckdb.Error, OSError) as error:  # OSError: as Arrow hands it on
            raise StoreError(f"{self.path} cannot be read: {error}") from error

    def rollouts(self) -> list[Rollout]:
        """All rollouts, oldest first. One that runs while nobody records was killed with its capture.

        One whose own record is lost, while calls or a seal of it are there, is listed as incomplete, and so
        is, once, one that several records claim to be.
        """
        found = self._select("FROM rollouts ORDER BY started_at, rollout_id").to_pylist()
        rollouts = list({r["rollout_id"]: Rollout(**r) for r in reversed(found)}.values())
        copies = Counter(r["rollout_id"] for r in found)
        if isinstance(self._source, _File):
            for rollout in rollouts:
                if rollout.status == "running":
                    rollout.status, rollout.stop_reason = "interrupted", rows.KILLED_STOP_REASON
                    rollout.incomplete = rollout.incomplete or rows.KILLED_INCOMPLETE
        for rollout in rollouts:
            if copies[rollout.rollout_id] > 1:
                rollout.incomplete = TWO_RECORDS
        for row in self._select(_LOST).to_pylist():
            rollouts.append(Rollout(**row, status="interrupted", incomplete=LOST_RECORD))
        return sorted(rollouts, key=lambda r: (r.started_at or 0.0, r.rollout_id))

    def rewards(self) -> list[Reward]:
        """All verdicts, oldest first."""
        return [Reward(**r) for r in self._select('FROM rewards ORDER BY "at"').to_pylist()]

    def egress(self, rollout_id: str | None = None) -> list[EgressEvent]:
        """What was refused or stubbed, oldest first."""
        query = f'FROM egress{_where(rollout_id)} ORDER BY "at"'
        return [EgressEvent(**r) for r in self._select(query).to_pylist()]

    def calls(
        self, rollout_id: str | None = None, tokens: bool = True, wire: bool = False
    ) -> list[ModelCall]:
        """Calls, by rollout, in the order of its requests; `tokens` and `wire` only where asked for.

        `wire` brings `answer` and `upstream_body` too.
        """
        found = self._calls(f"{_where(rollout_id)} ORDER BY rollout_id, seq, call_id")
        if tokens:
            self._add_tokens(found, rollout_id)
        if wire:
            self._add_wire(found, f"FROM wire{_where(rollout_id)}")
        return found

    def readable_calls(self, rollout_id: str, wire: bool = False) -> tuple[list[ModelCall], dict[str, str]]:
        """As `calls`, with tokens, of one rollout, but those that are damaged are left out, and told why.

        A call whose bodies alone are damaged is told too, but is not left out.
        """
        lost: dict[str, str] = {}
        found = self._calls(f"{_where(rollout_id)} ORDER BY rollout_id, seq, call_id", lost)
        self._add_tokens(found, rollout_id, lost)
        readable = [call for call in found if call.call_id not in lost]
        if wire:
            self._add_wire(readable, f"FROM wire{_where(rollout_id)}", lost)
        return readable, lost

    def answers(self, rollout_ids: Sequence[str]) -> dict[str, Message]:
        """By call id what the engine said in these rollouts; nothing for a call whose answer is lost."""
        ids = ", ".join(map(rows.quote, rollout_ids)) or "NULL"
        found = self._select(f"SELECT call_id, answer FROM stored_calls WHERE rollout_id IN ({ids})")
        answers: dict[str, Message] = {}
        for row in found.to_pylist():
            try:
                answer = rows.answer_of(unpack(row["answer"] or b""))
            except (msgspec.MsgspecError, zstandard.ZstdError, struct.error):
                continue
            if answer is not None:
                answers[row["call_id"]] = answer
        return answers

    def call(self, call_id: str) -> ModelCall | None:
        """One call whole, by its id or by the only beginning or end of one; None where there is none.

        Raises:
            StoreError: several calls begin or end so.
        """
        text = rows.quote(call_id)
        found = self._calls(
            f" WHERE starts_with(call_id, {text}) OR ends_with(call_id, {text})"
            f" ORDER BY call_id <> {text}, call_id LIMIT 6"
        )
        if not found:
            return None
        if len(found) > 1 and found[0].call_id != call_id:
            raise StoreError(f"{call_id!r} may be {', '.join(c.call_id for c in found)}")
        chosen = found[:1]
        self._add_tokens(chosen, chosen[0].rollout_id)
        chain = (
            "WITH RECURSIVE chain AS ("
            f"FROM wire WHERE call_id = {rows.quote(chosen[0].call_id)} UNION ALL "
            "SELECT w.* FROM wire w JOIN chain ON w.call_id = chain.body_base_id) FROM chain"
        )
        self._add_wire(chosen, chain)
        return chosen[0]

    def prompt(self, call_id: str) -> list[int]:
        """The whole prompt [P] of one call.

        Raises:
            StoreError: there is no such call.
        """
        query = f"SELECT any_value(rollout_id) AS id FROM calls WHERE call_id = {rows.quote(call_id)}"
        rollout_id = self._select(query)["id"][0].as_py()
        if rollout_id is None:
            raise StoreError(f"no call {call_id} in {self.path}")
        return whole_prompt(call_id, self._links(rollout_id), {})

    def close(self) -> None:
        """Let go of the store."""
        if self._source:
            self._source.con.close()
            self._source = None

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- behind it ------------------------------------------------------------------------------------

    def _find(self) -> _File | _Remote:
        live = share.find_live(self.path)
        if live is None:
            if not self.path.exists():
                raise StoreError(f"there is no store {self.path}")
            return _File(self.path, _SMALL)
        if not live.uri:
            raise schema.StoreLocked(self.path, live.pid)
        remote = _Remote(live)
        try:
            remote.select("SELECT 1")
        except duckdb.IOException as error:  # it ended since we looked
            remote.con.close()
            raise schema.StoreLocked(self.path, live.pid) from error
        return remote

    def _select(self, query: str) -> pa.Table:
        if self._source is None:
            raise StoreError("the reader is closed")
        try:
            return self._source.select(query)
        except duckdb.OutOfMemoryException as error:
            if isinstance(self._source, _Remote):
                raise StoreError(str(error)) from error
            self.close()
            self._source = _File(self.path, _LARGE)
        except duckdb.IOException as error:
            if isinstance(self._source, _File):
                raise StoreError(f"{self.path} cannot be read: {error}") from error
            self.close()  # the recorder has ended: the store is at its file now, or with the next one
            self.connect()
        except duckdb.Error as error:
            raise StoreError(str(error)) from error
        try:
            return self._source.select(query)
        except duckdb.Error as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error

    # In these, a call that is damaged ends the reading, or is told in `lost`, where there is one.

    def _calls(self, rest: str, lost: dict[str, str] | None = None) -> list[ModelCall]:
        found = self._select(f"SELECT {', '.join(rows.CALL)}, lineage FROM stored_calls{rest}")
        calls = []
        for row in found.to_pylist():
            with _telling(row["call_id"], lost):
                calls.append(rows.call_of(row))
        return calls

    def _links(self, rollout_id: str | None) -> dict[str, Link]:
        return rows.links_of(_without_nulls(self._select(rows.links_sql(rollout_id))))

    def _add_tokens(
        self, calls: list[ModelCall], rollout_id: str | None, lost: dict[str, str] | None = None
    ) -> None:
        links = self._links(rollout_id)
        done: dict[str, list[int]] = {}
        for call in calls:
            with _telling(call.call_id, lost):
                if call.call_id not in links:
                    raise StoreError(f"call {call.call_id} lacks some of its tokens")
                call.prompt_token_ids = whole_prompt(call.call_id, links, done)
                call.completion_token_ids = links[call.call_id].completion
                call.behaviour_logprobs = links[call.call_id].logprobs

    def _add_wire(self, calls: list[ModelCall], query: str, lost: dict[str, str] | None = None) -> None:
        found = {row["call_id"]: row for row in self._select(query).to_pylist()}
        stored = dict(found)
        done: dict[str, tuple[bytes, bytes]] = {}

        def bodies(call_id: str | None) -> tuple[bytes, bytes]:
            if call_id is None:
                return b"", b""
            if call_id not in done:
                row = stored.pop(call_id)  # a chain that comes back to itself has lost its end
                request, upstream = bodies(row["body_base_id"])
                done[call_id] = unpack(row["request_body"], request), unpack(row["upstream_body"], upstream)
            return done[call_id]

        def add(call: ModelCall) -> None:
            row = found[call.call_id]
            try:
                request, call.upstream_body = bodies(call.call_id)
                call.wire = rows.wire_of(row, request, unpack(row["response_body"]))
                call.answer = rows.answer_of(unpack(row["answer"] or b""))
            except KeyError as error:
                raise StoreError(
                    f"call {call.call_id} has no bodies: call {error}, on top of which they are, is lost"
                ) from None
            except (msgspec.MsgspecError, zstandard.ZstdError, struct.error, TypeError) as error:
                raise StoreError(f"the bodies of call {call.call_id} are damaged: {error}") from None

        for call in calls:
            with _telling(call.call_id, lost):
                add(call)


@contextmanager
def _telling(call_id: str, lost: dict[str, str] | None) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        if lost is None:
            raise
        lost[call_id] = str(error)


def _without_nulls(links: pa.Table) -> pa.Table:
    """Without calls that lack some of their tokens: a NULL is no token, and none is made up for it."""
    shared = pc.or_(pc.is_valid(links["prompt_shared"]), pc.is_null(links["prompt_parent_id"]))
    whole = shared.to_pylist()
    for name in rows.TOKENS:
        column = links[name]
        if column.null_count or pc.list_flatten(column).null_count:
            fine = (each.is_valid and not each.values.null_count for each in column)
            whole = [w and f for w, f in zip(whole, fine, strict=True)]
    return links if all(whole) else links.filter(pa.array(whole))


def _where(rollout_id: str | None) -> str:
    return "" if rollout_id is None else f" WHERE rollout_id = {rows.quote(rollout_id)}"
