"""`polar-mitm reconstruct` and `polar-mitm export`: one rollout in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polar_mitm.cli import exporting
from polar_mitm.cli.exits import BUG, NO, fail
from polar_mitm.cli.exporting import Format, Selection
from polar_mitm.cli.output import JsonFlag, counted, plural, print_json, print_table, say, short, tell
from polar_mitm.cli.reading import (
    BuilderName,
    BuilderOption,
    RolloutOption,
    StoreOption,
    chosen,
    reading,
    tell_incomplete,
)
from polar_mitm.types import Rollout

if TYPE_CHECKING:
    from polar_mitm.reconstruct import BuildReport, Trajectory
    from polar_mitm.store.offline import Selects

RECONSTRUCT_EXAMPLES = (
    "$ polar-mitm reconstruct -s runs.duckdb\n\n"
    "$ polar-mitm reconstruct -s runs.duckdb --write  # then: SELECT ... FROM trajectories\n\n"
    "$ polar-mitm reconstruct -s runs.duckdb --builder polar-splice --json | jq .mismatched"
)
EXPORT_EXAMPLES = (
    "$ polar-mitm export -s runs.duckdb -o trajectories.parquet\n\n"
    "$ polar-mitm export -s runs.duckdb -o calls.parquet --what calls\n\n"
    "$ polar-mitm export -s runs.duckdb -o trl.parquet --format trl\n\n"
    "$ polar-mitm export -s runs.duckdb -o chat.jsonl --format sft-chat --min-reward 1"
)
MaxOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        min=1,
        metavar="N",
        help="Split what adds more tokens to its context, where calls end; each part has its whole context.",
    ),
]


class What(StrEnum):
    """What `export` writes."""

    trajectories = "trajectories"
    calls = "calls"


@dataclass(frozen=True, slots=True)
class _How:
    """What a builder is asked for."""

    builder: BuilderName
    max_tokens: int | None

    def check(self) -> None:
        if self.max_tokens is not None and self.builder is BuilderName.polar_splice:
            fail("--max-tokens: polar-splice does not split; leave out one of the two")


def reconstruct(
    store: StoreOption,
    rollout: RolloutOption = None,
    builder: BuilderOption = BuilderName.forest,
    max_tokens: MaxOption = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Keep them in the store: tables trajectories, builds. Not while a capture runs."
        ),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Rebuild trajectories; account for every sampled token.

    A sampled token is trained, masked (on another branch already, or not the
    task's own work) or quarantined (its call or its rollout cannot be trusted).
    Reasons are counted in tokens. A second table says how many calls began
    with the exact ids of the call they continue, and why the others did not.
    Exit code 1 if the account does not add up; then nothing is written.
    """
    how = _How(builder, max_tokens)
    how.check()
    if write:
        with reading(store) as reader:
            rollouts = chosen(reader, rollout)
        reports = _write(store, rollouts, how)
    else:
        reports = [report for report, _ in _built(store, rollout, how)]
    adds_up = all(report.adds_up for report in reports)
    if json:
        listed = [
            {"rollout_id": r.rollout_id, "num_trajectories": r.num_trajectories, "report": r} for r in reports
        ]
        summary = {
            "adds_up": adds_up,
            "builder": builder,
            "written": write and adds_up,
            "accounting": account(reports),
            "mismatched": sum(r.mismatched for r in reports),
            "num_continued": sum(r.num_continued for r in reports),
            "fallbacks": fallbacks(reports),
        }
        print_json(summary | {"rollouts": listed})
    else:
        _tell(reports, adds_up)
        if write and adds_up:
            say(f"written to {store}: SELECT * FROM trajectories WHERE builder = '{builder}'")
    if not adds_up:
        say("the account does not add up: some sampled token is lost, or counted twice", style="red")
        raise typer.Exit(NO)


def export(
    store: StoreOption,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")],
    what: Annotated[What, typer.Option(help="One row per trajectory, or per call.")] = What.trajectories,
    format: Annotated[
        Format, typer.Option(help="parquet: our own, which has everything; else another trainer's.")
    ] = Format.parquet,
    reward: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which verdict other trainers' records take; else as `train`."),
    ] = None,
    min_reward: Annotated[
        float | None, typer.Option(metavar="R", help="Only rollouts that earned as much; not for parquet.")
    ] = None,
    rollout: RolloutOption = None,
    builder: BuilderOption = BuilderName.forest,
    max_tokens: MaxOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: JsonFlag = False,
) -> None:
    """Write trajectories or calls to a file, for any reader or for another trainer.

    Trajectories have token ids, loss mask, behaviour logprobs, policy versions,
    and spans that say which call each token comes from and why it is masked.
    The file appears when it is whole; its schema's metadata describes the
    columns. Rollouts in which nothing can be trusted have no trajectory.

    trl: Parquet with what a rollout_func of TRL's GRPOTrainer returns
    (prompt_ids, completion_ids, logprobs, env_mask) and the reward. verl:
    Parquet with the fields of its AgentLoopOutput (prompt_ids, response_ids,
    response_mask, response_logprobs, reward_score) and uid, the group.
    nemo-gym: lines of NeMo Gym's rollouts.jsonl, with token ids and logprobs
    on each answer that trains. sft-chat: lines of messages and tools. These
    four hold trajectories with a token that trains, of rollouts that were
    judged.
    """
    from polar_mitm.export import export_calls, export_trajectories

    how = _How(builder, max_tokens)
    how.check()
    selection = Selection(reward, min_reward)
    if format is not Format.parquet and what is What.calls:
        fail("--what calls is for --format parquet; other trainers take trajectories")
    if format is Format.parquet and min_reward is not None:
        fail("--min-reward is for other trainers' formats; in Parquet, join the store's rewards")
    if out.is_dir():
        fail(f"--out takes a file, and {out} is a directory")
    if not out.absolute().parent.is_dir():
        fail(f"--out: there is no directory {out.absolute().parent}")
    try:
        if format is not Format.parquet:
            with reading(store) as reader:
                rebuilt = _build(reader, chosen(reader, rollout), how)
                num_rows = exporting.write(format, reader, rebuilt, selection, out, force)
            selection.tell()
        elif what is What.calls:
            with reading(store) as reader:
                rollouts = counted(chosen(reader, rollout), "exporting calls")
                calls = (call for each in rollouts for call in reader.calls(each.rollout_id))
                num_rows = export_calls(calls, out, force=force)
        else:
            built = (t for _, trajectories in _built(store, rollout, how) for t in trajectories)
            num_rows = export_trajectories(built, out, builder=builder.value, force=force)
    except FileExistsError:
        fail(f"{out} exists: --force overwrites it")
    except OSError as error:
        fail(f"--out: {out} cannot be written: {error.strerror}")
    if json:
        document = {"path": out, "what": what, "format": format, "num_rows": num_rows}
        print_json(document if format is Format.parquet else {**document, "left_out": selection.counts})
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


def fallbacks(reports: Iterable[BuildReport]) -> dict[str, int]:
    """Why calls were rendered anew, each reason with its number of calls, the most frequent first."""
    return dict(sum((Counter(r.fallbacks) for r in reports), Counter()).most_common())


def _tell(reports: Sequence[BuildReport], adds_up: bool) -> None:
    print_table(
        "rollout,trajectories,calls,sampled,trained,masked,quarantined,reasons",
        [
            (
                short(r.rollout_id),
                r.num_trajectories,
                r.num_calls,
                r.sampled,
                r.trained,
                r.num_masked,
                r.num_quarantined,
                reasons(r),
            )
            for r in reports
        ],
    )
    if any(r.num_continued or r.fallbacks for r in reports):
        tell()
        rows = [
            (
                short(r.rollout_id),
                r.num_continued,
                sum(r.fallbacks.values()),
                ", ".join(f"{why} {n}" for why, n in fallbacks([r]).items()),
            )
            for r in reports
        ]
        print_table("rollout,exact,rendered anew,why", rows)
        tell()
    totals, num_built = account(reports), sum(r.num_trajectories for r in reports)
    tell(
        f"{plural(num_built, 'trajectory', 'trajectories')}; {totals['sampled']} sampled "
        f"{'=' if adds_up else '!='} {totals['trained']} trained + {totals['masked']} masked + "
        f"{totals['quarantined']} quarantined"
    )
    if mismatched := sum(r.mismatched for r in reports):
        say(f"{plural(mismatched, 'trained token')} under another context than sampled under", style="yellow")


def _built(store: Path, rollout: str | None, how: _How) -> Iterator[tuple[BuildReport, Sequence[Trajectory]]]:
    with reading(store) as reader:
        for _, report, trajectories in _build(reader, chosen(reader, rollout), how):
            yield report, trajectories


def write_trajectories(store: Path, builder: str, rollout_ids: Container[str]) -> None:
    """As `reconstruct --write`, of some rollouts; the end of the command where they do not add up."""
    with reading(store) as reader:
        rollouts = [each for each in reader.rollouts() if each.rollout_id in rollout_ids]
    if not all(report.adds_up for report in _write(store, rollouts, _How(BuilderName(builder), None))):
        fail("the account does not add up: some sampled token is lost, or counted twice", BUG)


def _write(store: Path, rollouts: Sequence[Rollout], how: _How) -> list[BuildReport]:
    """The accounts of what is in the store now; where one does not add up, it is as it was."""
    from polar_mitm.store.offline import writing
    from polar_mitm.store.trajectories import TrajectoryWriter

    reports = []
    with writing(store) as changes:
        writer = TrajectoryWriter(changes, how.builder.value, [each.rollout_id for each in rollouts])
        for each, report, trajectories in _build(changes, rollouts, how):
            writer.write(each.rollout_id, trajectories, report)
            reports.append(report)
        writer.flush()
        if not all(report.adds_up for report in reports):
            changes.discard()
    return reports


def _build(
    source: Selects, rollouts: Sequence[Rollout], how: _How
) -> Iterator[tuple[Rollout, BuildReport, Sequence[Trajectory]]]:
    from polar_mitm.reconstruct import build
    from polar_mitm.store.columns import each_rollout

    tell_incomplete(rollouts)
    columns = each_rollout(source, [each.rollout_id for each in rollouts])
    for each, calls in zip(counted(rollouts, "reconstructing"), columns, strict=True):
        trajectories, report = build(
            calls, rollout=each, builder=how.builder.value, max_tokens=how.max_tokens
        )
        yield each, report, trajectories
