"""What `polar-mitm verify` looks at: trajectories as they are stored, or built for the occasion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from msgspec import Struct, convert
from msgspec.json import decode
from numpy.typing import NDArray

from polar_mitm.types import ModelCall, Rollout

if TYPE_CHECKING:
    from polar_mitm.reconstruct import Builder
    from polar_mitm.store import StoreReader
    from polar_mitm.verify import Account, Path

Source = Literal["stored", "built"]


class StoredSpan(Struct, frozen=True):
    """Where a call lies in a stored trajectory."""

    call_id: str
    sampled_start: int
    end: int
    mask_reason: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StoredPath:
    """A trajectory as it was read from the store."""

    trajectory_id: str
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    behaviour_logprobs: NDArray[np.float32]
    spans: Sequence[StoredSpan]


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
    """Trajectories of one rollout, `num_paths` of them, each assembled when it is asked for."""

    source: Source
    num_paths: int
    paths: Iterable[Path]
    account: Account


def trajectories_of(
    reader: StoreReader, rollout: Rollout, calls: Sequence[ModelCall], builder: Builder
) -> Input:
    """What `reconstruct --write` left of a rollout; where it left nothing, what the builder makes now."""
    from polar_mitm.reconstruct import build

    where = f"rollout_id = {_quote(rollout.rollout_id)} AND builder = {_quote(builder)}"
    found = reader.sql(f"SELECT report FROM builds WHERE {where}").to_pylist()
    if not found:
        paths, account = build(calls, rollout=rollout, builder=builder)
        return Input("built", len(paths), paths, account)
    listed = reader.sql(f"SELECT trajectory_id FROM trajectories WHERE {where} ORDER BY trajectory_id")
    ids = listed["trajectory_id"].to_pylist()
    return Input(
        "stored", len(ids), _stored(reader, where, ids), decode(found[-1]["report"], type=StoredAccount)
    )


def _stored(reader: StoreReader, where: str, ids: Sequence[str]) -> Iterator[StoredPath]:
    for trajectory_id in ids:
        row = reader.sql(
            "SELECT token_ids, loss_mask, behaviour_logprobs, spans FROM trajectories "
            f"WHERE {where} AND trajectory_id = {_quote(trajectory_id)}"
        )

        def array(name: str, dtype: Any, row: Any = row) -> Any:
            return row[name].combine_chunks().values.to_numpy(zero_copy_only=False).astype(dtype)

        yield StoredPath(
            trajectory_id,
            array("token_ids", np.int32),
            array("loss_mask", np.uint8),
            array("behaviour_logprobs", np.float32),
            convert(row["spans"][0].as_py(), list[StoredSpan]),
        )


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
