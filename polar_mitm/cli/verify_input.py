"""What `polar-mitm verify` looks at: trajectories as they are stored, or built for the occasion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from msgspec import MsgspecError, Struct
from msgspec.json import decode

from polar_mitm.types import Rollout

if TYPE_CHECKING:
    from polar_mitm.columns import RolloutColumns
    from polar_mitm.reconstruct import Builder
    from polar_mitm.store import StoreReader
    from polar_mitm.verify import Account, Path, Sampled

Source = Literal["stored", "built"]
_HOLES = ("lost_prefix", "duplicate_call_id")  # no recording ends like this


class StoredAccount(Struct):
    """The account of a stored build."""

    sampled: int
    trained: int
    masked: dict[str, int]
    quarantined: dict[str, int]

    @property
    def adds_up(self) -> bool:
        """Whether each sampled token is trained once, masked, or quarantined."""
        kept_out = sum(self.masked.values()) + sum(self.quarantined.values())
        return self.sampled == self.trained + kept_out


@dataclass(frozen=True, slots=True)
class Input:
    """One rollout: its calls that can be read, and its trajectories, `num_paths` of them, each assembled when
    it is asked for. `holes` says in sentences what is wrong with the record; `num_unreadable` counts the
    tokens that were sampled by the calls that cannot be read."""

    calls: Sequence[Sampled]
    num_unreadable: int
    holes: Sequence[str]
    source: Source
    num_paths: int
    paths: Iterable[Path]
    account: Account


def input_of(
    reader: StoreReader, rollout: Rollout, columns: RolloutColumns, builder: Builder, wire: bool
) -> Input:
    """What `reconstruct --write` left of a rollout, else what the builder makes of its columns, as
    `reconstruct` does; and its calls, read in another way, to compare that with.

    Raises:
        StoreError: the store cannot be read.
    """
    from polar_mitm.reconstruct import build
    from polar_mitm.store.reader import LOST_RECORD, TWO_RECORDS
    from polar_mitm.store.trajectories import stored_trajectories
    from polar_mitm.verify import sampled

    calls, lost = reader.readable_calls(rollout.rollout_id, wire)
    known = set(columns.call_ids)  # a capture may have added others since
    calls = [call for call in calls if call.call_id in known]
    readable = {call.call_id for call in calls}
    num_sampled = np.maximum(columns.completion.lengths, columns.num_reported)
    unreadable = [row for row, call_id in enumerate(columns.call_ids) if call_id not in readable]
    paths, account = build(columns, rollout=rollout, builder=builder)
    holes = [why for call_id, why in lost.items() if call_id in known]
    holes += [
        f"call {call_id} is quarantined: {why}"
        for call_id, why in account.quarantined_calls
        if why in _HOLES and call_id not in lost
    ]
    if rollout.incomplete in (LOST_RECORD, TWO_RECORDS):
        holes.insert(0, rollout.incomplete)
    record = list(map(sampled, calls)), int(num_sampled[unreadable].sum()), holes
    where = f"rollout_id = {_quote(rollout.rollout_id)} AND builder = {_quote(builder)}"
    found = reader.sql(f"SELECT report FROM builds WHERE {where}").to_pylist()
    if not found:
        return Input(*record, "built", len(paths), paths, account)
    listed = reader.sql(f"SELECT count(*) AS n FROM trajectories WHERE {where}")
    try:
        stored = decode(found[-1]["report"], type=StoredAccount)
    except (MsgspecError, TypeError):
        holes.append("its stored account is damaged: `polar-mitm reconstruct --write` writes it again")
        stored = StoredAccount(0, 0, {}, {})
    if rollout.incomplete is not None and stored.trained:
        holes.append(
            f"it is incomplete ({rollout.incomplete}), and its stored trajectories were written before that: "
            "`polar-mitm reconstruct --write` writes them again"
        )
    written = stored_trajectories(reader, rollout.rollout_id, builder)
    return Input(*record, "stored", listed["n"][0].as_py(), written, stored)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
