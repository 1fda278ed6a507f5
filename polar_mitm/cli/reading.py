"""What the commands that read a store share. They all work while a capture writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_mitm.cli.exits import fail
from polar_mitm.cli.output import plural, say
from polar_mitm.types import Rollout

if TYPE_CHECKING:
    from polar_mitm.store import StoreReader

StoreOption = Annotated[
    Path, typer.Option("--store", "-s", metavar="FILE", help="The DuckDB file of a capture.")
]
RolloutOption = Annotated[
    str | None,
    typer.Option("--rollout", "-r", metavar="ID", help="Only this rollout: its id, or the end of it."),
]
_NUM_NAMED = 5


class BuilderName(StrEnum):
    """Who makes the trajectories."""

    forest = "forest"
    per_request = "per-request"
    polar_splice = "polar-splice"


BuilderOption = Annotated[
    BuilderName,
    typer.Option(
        help="forest: one trajectory per path of exact prefixes; per-request: one per call; polar-splice: "
        "Polar's rule, its context mismatches counted."
    ),
]


@contextmanager
def reading(store: Path) -> Iterator[StoreReader]:
    """An open reader.

    Raises:
        StoreError: it cannot be read; the message says why.
    """
    from polar_mitm.store import open_reader

    if store.is_dir():
        fail(f"--store takes a file, and {store} is a directory")
    with open_reader(store) as reader:
        yield reader


def chosen(reader: StoreReader, rollout: str | None) -> list[Rollout]:
    """All rollouts, or the one that is asked for; the end of the command where there is none."""
    found = reader.rollouts()
    if rollout is None:
        return found
    exact = [r for r in found if r.rollout_id == rollout]
    alike = exact or [r for r in found if rollout and r.rollout_id.endswith(rollout)]
    if len(alike) > 1:
        fail(f"--rollout: {rollout!r} may be {', '.join(r.rollout_id for r in alike[:5])}")
    if not alike:
        fail(f"--rollout: {reader.path} has no rollout {rollout!r} (`polar-mitm calls` lists them)")
    return alike


def tell_incomplete(rollouts: Sequence[Rollout]) -> None:
    """Which of them are never trained on, and why."""
    told = [r for r in rollouts if r.incomplete]
    for each in told[:_NUM_NAMED]:
        say(f"rollout {each.rollout_id} is never trained on: {each.incomplete}", style="yellow")
    if len(told) > _NUM_NAMED:
        say(f"... and {plural(len(told) - _NUM_NAMED, 'rollout')} more", style="yellow")
