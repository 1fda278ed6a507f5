"""What `polar-mitm verify` looks at: trajectories as they are stored, or built for the occasion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.json import decode

from polar_mitm.types import ModelCall, Rollout

if TYPE_CHECKING:
    from polar_mitm.reconstruct import Builder
    from polar_mitm.store import StoreReader
    from polar_mitm.verify import Account, Path

Source = Literal["stored", "built"]


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
    from polar_mitm.store.trajectories import stored_trajectories

    where = f"rollout_id = {_quote(rollout.rollout_id)} AND builder = {_quote(builder)}"
    found = reader.sql(f"SELECT report FROM builds WHERE {where}").to_pylist()
    if not found:
        paths, account = build(calls, rollout=rollout, builder=builder)
        return Input("built", len(paths), paths, account)
    listed = reader.sql(f"SELECT count(*) AS n FROM trajectories WHERE {where}")
    return Input(
        "stored",
        listed["n"][0].as_py(),
        stored_trajectories(reader, rollout.rollout_id, builder),
        decode(found[-1]["report"], type=StoredAccount),
    )


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
