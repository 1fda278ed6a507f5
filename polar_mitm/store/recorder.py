"""The only writer of a store: a bounded queue, one thread, group commit.

Callers hand over a record and get a future; they never wait for a disk and never see an exception. Whatever
goes wrong, the harness keeps its answers: the future resolves False, the rollout is incomplete, and the
operator hears of it once.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import duckdb

from polar_mitm.errors import StoreError
from polar_mitm.store.hold import Hold
from polar_mitm.store.inbox import Inbox, Item, Record
from polar_mitm.store.packing import AlreadyRecorded
from polar_mitm.store.schema import NotAStore
from polar_mitm.store.writer import Batch, FileVanished, RolloutSealed
from polar_mitm.types import EgressEvent, ModelCall, Reward, Rollout

_log = logging.getLogger(__name__)
_MAX_PENDING_BYTES = 256 << 20
_MAX_COMMIT_BYTES = 64 << 20
_LOCK_WAIT_S = 2.0
_RETRY_S = 1.0
_CLOSE_S = 60.0
_MAX_ALARMS = 100
_FAILURES = (duckdb.Error, OSError, StoreError)
# What is wrong with a record, not with the store.
_CONTENT_ERRORS = (duckdb.DataError, duckdb.ProgrammingError, ValueError, TypeError, OverflowError)


class Recorder:
    """Writes one store.

    Args:
        path: the store; made with its folder where missing.
        flush_interval_s: commits begin at least this far apart, so that a burst shares one; `flush` says
            that there is none.
        max_pending: records that may wait; one more is refused, and its rollout is incomplete.
        on_alarm: called with one sentence per distinct problem, from any thread.
        share: let other processes read while this one writes.
    """

    def __init__(
        self,
        path: Path,
        *,
        flush_interval_s: float = 0.01,
        max_pending: int = 4096,
        on_alarm: Callable[[str], None] = _log.error,
        share: bool = True,
    ) -> None:
        self.path = path.resolve()
        """The store that records go to; the rescue store where there is one."""
        self.found: frozenset[str] = frozenset()
        """Rollouts that were in the store when it was opened."""
        self.rescue_path: Path | None = None
        self._flush_interval_s = flush_interval_s
        self._on_alarm = on_alarm
        self._share = share
        self._inbox = Inbox(max_pending, _MAX_PENDING_BYTES)
        self._thread: threading.Thread | None = None
        self._alarm_lock = threading.Lock()
        self._alarms: set[str] = set()
        self._incomplete: dict[str, str] = {}
        self._unmarked: dict[str, str] = {}
        self._rescue_reason: str | None = None
        self._touched: set[str] = set()
        self._hold: Hold | None = None
        self._takeover = True
        self._lost: Exception = StoreError(f"{path} is not open")
        self._retry_at = 0.0
        self._gave_up = False

    # --- for callers --------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the store, or a rescue store next to it or in the folder for temporary files.

        Rollouts that a killed capture left running in it become interrupted and incomplete.

        Raises:
            StoreError: the file is no store, or a newer program's: a mistake to mend before anything runs.
        """
        try:
            self._hold = self._take(self.path, _LOCK_WAIT_S)
        except NotAStore:
            raise
        except _FAILURES as error:
            self._open_rescue(error)
        if self._hold:
            self.found = self._hold.writer.found
        self._thread = threading.Thread(target=self._run, name="polar-mitm-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Store what is queued, checkpoint, and let go of the file. Further records resolve False."""
        self._inbox.close()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                self._alarm(f"{self.path} did not take its last records in {_CLOSE_S:.0f} s")

    def __enter__(self) -> Recorder:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rollout(self, r: Rollout) -> Future[bool]:
        """Store a rollout, or what became of it. True when durable."""
        return self._submit(r)

    def call(self, c: ModelCall) -> Future[bool]:
        """Store a call, which the caller does not change any more. True when durable."""
        return self._submit(c)

    def egress(self, e: EgressEvent) -> None:
        """Store an event that is no model call."""
        self._submit(e)

    def reward(self, r: Reward) -> Future[bool]:
        """Store a verdict. True when durable."""
        return self._submit(r)

    def flush(self) -> None:
        """Commit what has come at once: nobody else is about to share the commit."""
        self._inbox.hurry()

    def incomplete(self, rollout_id: str) -> str | None:
        """Why the record of a rollout has holes; None when it has none."""
        return self._incomplete.get(rollout_id) or self._rescue_reason

    def _submit(self, record: Record) -> Future[bool]:
        item = Item(record)
        if self._thread is None or self._inbox.closed:
            self._fail([item], f"{self.path} is not open for a record that came")
        elif not self._inbox.put(item):
            self._fail([item], f"{self.path} cannot keep up, and records are dropped")
        return item.future

    # --- the writer's thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while not (self._inbox.drained and (self._gave_up or not self._unmarked)):
            items = self._inbox.take(_MAX_COMMIT_BYTES, self._patience())
            began = time.monotonic()
            try:
                self._store(items)
            except Exception as error:  # a bug of ours must not leave callers waiting for ever
                self._undo(items)
                self._fail(items, f"recording failed: {error!r}")
            if not self._inbox.closed:
                self._inbox.pause(began + self._flush_interval_s - time.monotonic())
        if self._hold:
            self._compact(force=True)
            self._let_go()

    def _patience(self) -> float | None:
        """How long to wait for a record when nothing else happens."""
        if self._inbox.closed:
            return 0.0
        return _RETRY_S if self._unmarked else None

    def _store(self, items: list[Item]) -> None:
        """Commit what can be packed of `items`, with the marks that no commit has taken yet."""
        batch = Batch()
        packed = [item for item in items if self._pack(item, batch)]
        batch.marks = dict(self._unmarked)
        if not packed and not batch.marks:
            return
        try:
            self._held().writer.commit(batch)
        except (*_CONTENT_ERRORS, *_FAILURES) as error:
            self._recover(packed, error)
            return
        for item in packed:
            item.resolve(True)
        for rollout_id in batch.marks:
            self._unmarked.pop(rollout_id, None)
        self._compact()

    def _pack(self, item: Item, batch: Batch) -> bool:
        """Add a record to a batch; False when it cannot be."""
        record = item.record
        try:
            self._held().writer.check_open(record.rollout_id)
            match record:
                case ModelCall():
                    batch.calls.append(self._held().writer.packer.pack(record))
                    self._touched.add(record.rollout_id)
                case Rollout():
                    batch.rollouts.append(record)
                case Reward():
                    batch.rewards.append(record)
                case EgressEvent():
                    batch.egress.append(record)
        except (AlreadyRecorded, RolloutSealed) as error:
            if isinstance(error, RolloutSealed):
                self._incomplete.setdefault(record.rollout_id, str(error))
            self._alarm(str(error))
            item.resolve(False)
            return False
        except _CONTENT_ERRORS as error:
            self._fail([item], f"a call could not be stored: {_first_line(error)}")
            return False
        except _FAILURES as error:
            self._fail([item], f"cannot write to {self.path}: {_first_line(error)}")
            return False
        if self._rescue_reason and not isinstance(record, EgressEvent):
            self._mark(record.rollout_id, self._rescue_reason)
        return True

    def _recover(self, items: list[Item], error: Exception) -> None:
        """Deal with a batch that could not be committed."""
        self._undo(items)
        self._gave_up = self._inbox.closed
        if isinstance(error, FileVanished):
            for rollout_id in self._touched:
                self._mark(rollout_id, str(error))
            self._let_go()
            self._fail(items, str(error))
        elif isinstance(error, _CONTENT_ERRORS) and len(items) > 1:
            # Some record in it is at fault: the others are not to suffer.
            middle = len(items) // 2
            self._store(items[:middle])
            self._store(items[middle:])
        else:
            self._fail(items, f"cannot write to {self.path}: {_first_line(error)}")
            if self._hold and not self._hold.writer.usable():
                self._let_go()

    def _undo(self, items: list[Item]) -> None:
        if self._hold:
            self._hold.writer.packer.undo(i.record.call_id for i in items if isinstance(i.record, ModelCall))

    def _compact(self, *, force: bool = False) -> None:
        try:
            self._held().writer.compact(force=force)
        except _FAILURES as error:
            # Nothing is lost: the log has it, and whoever opens the file next reads the log.
            self._alarm(f"cannot checkpoint {self.path}: {_first_line(error)}")
            self._let_go()

    # --- the file -------------------------------------------------------------------------------------

    def _take(self, path: Path, wait_s: float = 0.0) -> Hold:
        hold = Hold(path, wait_s, takeover=self._takeover, share=self._share, on_alarm=self._alarm)
        self._takeover = False  # what runs in it from here on is ours, also when we have to open it again
        return hold

    def _held(self) -> Hold:
        """The hold on the store, taken again where a failure has cost it, though not without a pause."""
        if self._hold is None:
            if time.monotonic() < self._retry_at:
                raise self._lost
            self._retry_at = time.monotonic() + _RETRY_S
            try:
                self._hold = self._take(self.path)
            except _FAILURES as error:
                self._lost = error
                raise
        return self._hold

    def _let_go(self) -> None:
        if self._hold:
            self._hold.release()
            self._hold = None

    def _open_rescue(self, cause: Exception) -> None:
        why = f"{self.path} cannot be written ({_first_line(cause)})"
        for folder in (self.path.parent, Path(tempfile.gettempdir())):
            path = folder / f"{self.path.stem}.rescue-{os.getpid()}.duckdb"
            try:
                self._hold = self._take(path)
            except _FAILURES:
                continue
            self.path = self.rescue_path = path
            self._rescue_reason = f"recorded in {path}: {why}"
            self._alarm(f"{why}: recording into {path}, all of it marked incomplete")
            return
        self._rescue_reason = f"nothing is recorded: {why}"
        self._alarm(f"{why}, and no rescue store can be made either: nothing is recorded")

    # --- trouble --------------------------------------------------------------------------------------

    def _fail(self, items: list[Item], why: str) -> None:
        """These are not stored."""
        for item in items:
            if isinstance(item.record, ModelCall | Rollout):
                self._mark(item.record.rollout_id, why)
        self._alarm(f"{why}; the rollouts concerned are marked incomplete")
        for item in items:
            item.resolve(False)

    def _mark(self, rollout_id: str, why: str) -> None:
        if rollout_id not in self._incomplete:
            self._incomplete[rollout_id] = self._unmarked[rollout_id] = why

    def _alarm(self, text: str) -> None:
        with self._alarm_lock:
            if text in self._alarms or len(self._alarms) >= _MAX_ALARMS:
                return
            self._alarms.add(text)
        try:
            self._on_alarm(text)
        except Exception:  # whatever an operator's hook does, recording goes on
            _log.exception("on_alarm failed for: %s", text)


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
