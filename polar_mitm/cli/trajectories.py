"""`polar-mitm reconstruct` and `polar-mitm export`: one rollout in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_mitm.cli.exits import NO, fail
from polar_mitm.cli.output import JsonFlag, counted, plural, print_json, print_table, say, short, tell
from polar_mitm.cli.reading import RolloutOption, StoreOption, chosen, reading
from polar_mitm.types import ModelCall, Rollout

if TYPE_CHECKING:
    from polar_mitm.reconstruct import BuildReport

RECONSTRUCT_EXAMPLES = "$ polar-mitm reconstruct -s runs.duckdb"
EXPORT_EXAMPLES = (
    "$ polar-mitm export -s runs.duckdb -o trajectories.parquet\n\n"
    "$ polar-mitm export -s runs.duckdb -o calls.parquet --what calls"
)


class What(StrEnum):
    """What `export` writes."""

    trajectories = "trajectories"
    calls = "calls"


def reconstruct(store: StoreOption, rollout: RolloutOption = None, json: JsonFlag = False) -> None:
    """Rebuild trajectories; account for every sampled token.

    A sampled token is trained, masked (on another branch already, or not the
    task's own work) or quarantined (its call or its rollout cannot be trusted).
    Reasons are counted in tokens. Exit code 1 if the account does not add up.
    """
    from polar_mitm.reconstruct import build

    reports: list[tuple[str, int, BuildReport]] = []
    for each, found in _rollouts(store, rollout, "reconstructing"):
        trajectories, report = build(found, rollout=each)
        reports.append((each.rollout_id, len(trajectories), report))
    adds_up = all(report.adds_up for _, _, report in reports)
    if json:
        listed = [{"rollout_id": i, "num_trajectories": n, "report": r} for i, n, r in reports]
        print_json({"adds_up": adds_up, "accounting": account(r for _, _, r in reports), "rollouts": listed})
    else:
        rows = [
            (short(i), n, r.num_calls, r.sampled, r.trained, r.num_masked, r.num_quarantined, reasons(r))
            for i, n, r in reports
        ]
        print_table("rollout,trajectories,calls,sampled,trained,masked,quarantined,reasons", rows)
        totals = account(r for _, _, r in reports)
        num_built = plural(sum(n for _, n, _ in reports), "trajectory", "trajectories")
        tell(
            f"{num_built}; {totals['sampled']} sampled {'=' if adds_up else '!='} "
            f"{totals['trained']} trained + {totals['masked']} masked + {totals['quarantined']} quarantined"
        )
    if not adds_up:
        say("the account does not add up: some sampled token is lost, or counted twice", style="red")
        raise typer.Exit(NO)


def export(
    store: StoreOption,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The Parquet file to write.")],
    what: Annotated[What, typer.Option(help="One row per trajectory, or per call.")] = What.trajectories,
    rollout: RolloutOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: JsonFlag = False,
) -> None:
    """Write trajectories or calls to a Parquet file.

    Trajectories have token ids, loss mask and behaviour logprobs. The file
    appears when it is whole; its schema's metadata describes the columns.
    """
    from polar_mitm.export import export_calls, export_trajectories
    from polar_mitm.reconstruct import build

    if out.is_dir():
        fail(f"--out takes a file, and {out} is a directory")
    if not out.absolute().parent.is_dir():
        fail(f"--out: there is no directory {out.absolute().parent}")
    found = _rollouts(store, rollout, f"exporting {what}")
    try:
        if what is What.calls:
            num_rows = export_calls((c for _, calls in found for c in calls), out, force=force)
        else:
            built = (t for each, calls in found for t in build(calls, rollout=each)[0])
            num_rows = export_trajectories(built, out, force=force)
    except FileExistsError:
        fail(f"{out} exists: --force overwrites it")
    except OSError as error:
        fail(f"--out: {out} cannot be written: {error.strerror}")
    if json:
        print_json({"path": out, "what": what, "num_rows": num_rows})
    else:
        tell(f"{num_rows} {what} written to {out}")


def account(reports: Iterable[BuildReport]) -> dict[str, int]:
    """The account of several builds, in tokens."""
    total = {"sampled": 0, "trained": 0, "masked": 0, "quarantined": 0}
    for each in reports:
        total["sampled"] += each.sampled
        total["trained"] += each.trained
        total["masked"] += each.num_masked
        total["quarantined"] += each.num_quarantined
    return total


def reasons(report: BuildReport) -> str:
    """Why tokens do not train, each reason with its number of tokens."""
    return ", ".join(f"{why} {n}" for part in (report.masked, report.quarantined) for why, n in part.items())


def _rollouts(store: Path, rollout: str | None, text: str) -> Iterator[tuple[Rollout, list[ModelCall]]]:
    with reading(store) as reader:
        for each in counted(chosen(reader, rollout), text):
            yield each, reader.calls(each.rollout_id)
