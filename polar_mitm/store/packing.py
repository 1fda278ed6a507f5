"""Calls into rows, each on top of what its rollout's earlier calls hold. All the CPU work of recording."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import duckdb
import msgspec

from polar_mitm.errors import StoreError
from polar_mitm.store import rows
from polar_mitm.store.bodies import NO_BASE, Base, Packer
from polar_mitm.store.chains import Tip, Tips, checked, ids_text, num_ids, whole_prompt
from polar_mitm.store.redact import credentials
from polar_mitm.types import ModelCall

_MAX_HOPS = 32
_MAX_SEEN = 65_536
_RESTORED_CALLS = 16


class AlreadyRecorded(Exception):
    """A second record of one call."""


class CallPacker:
    """Packs the calls of one store; `con` is for what earlier processes stored."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self._con = con
        stored = con.execute("SELECT DISTINCT rollout_id FROM stored_calls").fetchall()
        self._stored: set[str] = {row[0] for row in stored}
        self._seen: dict[str, None] = {}
        self._tips = Tips()
        self._bodies = Packer()

    def pack(self, call: ModelCall) -> str:
        """A call as `call_log` holds it, its secrets removed.

        Raises:
            AlreadyRecorded: its id is taken.
            ValueError, TypeError, OverflowError: a field holds what its column cannot.
            duckdb.Error: what the rollout has stored cannot be read.
        """
        if call.call_id in self._seen:
            raise AlreadyRecorded(f"call {call.call_id} was recorded before; the first record stands")
        if call.rollout_id not in self._tips:
            self._restore(call.rollout_id)
        text = ids_text(call.prompt_token_ids)
        parent, shared_bytes = self._tips.best(call.rollout_id, text)
        whole = parent is not None and shared_bytes == len(parent.text)
        shared = parent.num_ids if parent and whole else num_ids(text[:shared_bytes])
        suffix = checked(text[shared_bytes:].removeprefix(b","))
        completion = checked(ids_text(call.completion_token_ids))
        base = parent if parent and parent.hops < _MAX_HOPS else None
        known = credentials(call.wire)
        pack = self._bodies.pack
        request, request_frame = pack(call.wire.request_body, known, base.request if base else NO_BASE)
        upstream, upstream_frame = pack(call.upstream_body, known, base.upstream if base else NO_BASE)
        _, response_frame = pack(call.wire.response_body, known, NO_BASE)
        _, answer_frame = pack(rows.answer_json(call.answer), known, NO_BASE)
        base_id = base.call_id if base else None
        logged = rows.logged(
            *rows.call_row(call, known, parent.call_id if parent and shared else None, shared),
            *rows.wire_row(call.wire, known, base_id, request_frame, upstream_frame, response_frame),
            msgspec.Raw(b"[%b]" % suffix),
            msgspec.Raw(b"[%b]" % completion),
            rows.floats(call.behaviour_logprobs),
            *rows.lineage_row(call, answer_frame),
        )
        if text:
            tip = Tip(
                call.call_id,
                b"%b,%b" % (text, completion) if completion else text,
                len(call.prompt_token_ids) + len(call.completion_token_ids),
                Base(request, known),
                Base(upstream, known),
                base.hops + 1 if base else 0,
            )
            self._tips.add(call.rollout_id, tip)
        self._stored.add(call.rollout_id)
        self._seen[call.call_id] = None
        if len(self._seen) > _MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return logged

    def undo(self, call_ids: Iterable[str]) -> None:
        """These were not stored after all, and nothing packed later may stand on them."""
        self._tips.clear()
        for call_id in call_ids:
            self._seen.pop(call_id, None)

    def _restore(self, rollout_id: str) -> None:
        """Learn the newest ends of a rollout's chains from the store, as after a restart."""
        tips = []
        if rollout_id in self._stored:
            links = rows.links_of(self._con.execute(rows.links_sql(rollout_id)).to_arrow_table())
            done: dict[str, list[int]] = {}
            for call_id in list(links)[-_RESTORED_CALLS:]:
                with suppress(StoreError):  # where the store has holes, what comes stands on its own
                    if prompt := whole_prompt(call_id, links, done):
                        ids = prompt + links[call_id].completion
                        tips.append(Tip(call_id, ids_text(ids), len(ids)))
        self._tips.restore(rollout_id, tips)
