"""The bounded queue between a recorder's callers and its thread."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from polar_mitm.types import EgressEvent, ModelCall, Reward, Rollout

Record = Rollout | ModelCall | EgressEvent | Reward


class Item:
    """A record on its way into the store, its weight in bytes, and who waits for it."""

    __slots__ = ("future", "record", "size")

    def __init__(self, record: Record) -> None:
        self.record = record
        self.size = 0
        if isinstance(record, ModelCall):
            wire = record.wire
            self.size = len(wire.request_body) + len(wire.response_body) + len(record.upstream_body)
        self.future: Future[bool] = Future()
        # A caller who stops waiting does not unmake the record.
        self.future.set_running_or_notify_cancel()

    def resolve(self, stored: bool) -> None:
        """Tell the caller, once."""
        if not self.future.done():
            self.future.set_result(stored)


class Inbox:
    """Takes items from any thread, never waits to do so; one thread takes them out."""

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._max_items, self._max_bytes = max_items, max_bytes
        self._items: deque[Item] = deque()
        self._num_bytes = 0
        lock = threading.RLock()
        self._changed, self._hurried = threading.Condition(lock), threading.Condition(lock)
        self._poked = self._in_a_hurry = False
        self.closed = False

    def put(self, item: Item) -> bool:
        """Queue `item`; False when there is no room for it, or the inbox is closed."""
        with self._changed:
            full = len(self._items) >= self._max_items or self._num_bytes + item.size > self._max_bytes
            if self.closed or (full and self._items):
                return False
            self._items.append(item)
            self._num_bytes += item.size
            self._changed.notify()
            return True

    def take(self, max_bytes: int, timeout: float | None) -> list[Item]:
        """What is queued, up to `max_bytes`; waits for an item, a `poke` or the time to pass."""
        with self._changed:
            self._changed.wait_for(lambda: self._poked or (self._items and max_bytes > 0), timeout)
            self._poked = self._in_a_hurry = False
            taken: list[Item] = []
            while self._items and max_bytes > 0:
                taken.append(self._items.popleft())
                max_bytes -= taken[-1].size
                self._num_bytes -= taken[-1].size
            return taken

    def hurry(self) -> None:
        """What is queued has waited enough: end the current or the next `pause`."""
        with self._changed:
            self._in_a_hurry = bool(self._items)
            self._hurried.notify()

    def pause(self, timeout: float) -> None:
        """Let records gather: wait for the time to pass, or until there is reason to `hurry`."""
        with self._changed:
            self._hurried.wait_for(lambda: self._in_a_hurry or self.closed, timeout)

    def poke(self) -> None:
        """End the current or the next `take`."""
        with self._changed:
            self._poked = True
            self._changed.notify()

    def close(self) -> None:
        """Take nothing more in."""
        with self._changed:
            self.closed = True
            self._hurried.notify()
        self.poke()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def drained(self) -> bool:
        """Closed, and empty for good."""
        return self.closed and not self._items
