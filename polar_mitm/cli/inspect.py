"""Commands that read a store: calls, show, reconstruct, export. They work while a capture runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from polar_mitm.cli.output import JsonFlag, err, fail, print_json, print_table, say
from polar_mitm.errors import StoreError
from polar_mitm.types import ModelCall

StoreOption = Annotated[Path, typer.Option("--store", "-s", help="The DuckDB file of a capture.")]
RolloutOption = Annotated[str | None, typer.Option("--rollout", "-r", help="Only this rollout.")]


@contextmanager
def reading(store: Path) -> Iterator[Any]:
    """An open reader; a store that cannot be read ends the command with its reason."""
    from polar_mitm.store import open_reader

    try:
        with open_reader(store) as reader:
            yield reader
    except StoreError as error:
        fail(str(error))


def calls(store: StoreOption, rollout: RolloutOption = None, json: JsonFlag = False) -> None:
    """List the model calls of a store, refused connections included."""
    with reading(store) as reader:
        found: list[ModelCall] = reader.calls(rollout)
        events = reader.egress(rollout)
        rollouts = reader.rollouts()
    if json:
        print_json({"rollouts": rollouts, "calls": [brief(c) for c in found], "egress": events})
        return
    rows = [
        (
            c.call_id,
            c.rollout_id[-6:],
            c.seq,
            c.role,
            c.dialect,
            c.status,
            len(c.prompt_token_ids),
            len(c.completion_token_ids),
            _first_token_ms(c),
            _tokens_per_s(c),
            c.error or c.finish_reason,
        )
        for c in found
    ]
    columns = "call rollout seq role dialect status prompt sampled first_ms tok/s outcome"
    print_table(f"{len(found)} calls", columns, rows)
    for r in rollouts:
        if r.incomplete and rollout in (None, r.rollout_id):
            say(f"[yellow]rollout {r.rollout_id} is incomplete:[/yellow] {r.incomplete}")
    if refused := [e for e in events if e.verdict == "refused"]:
        names = sorted({f"{e.layer}:{e.name}" for e in refused})
        say(f"{len(refused)} refused: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}")


def show(
    call: Annotated[str, typer.Argument(help="A call's id, or the end or beginning of one.")],
    store: StoreOption,
    tokens: Annotated[bool, typer.Option("--tokens", help="Print ids and logprobs.")] = False,
    wire: Annotated[bool, typer.Option("--wire", help="Print the raw request and response.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show one model call whole: timing, sampling, tokens, wire."""
    with reading(store) as reader:
        found: ModelCall | None = reader.call(call)
    if found is None:
        fail(f"no call {call!r} in {store} (polar-mitm calls --store {store} lists them)")
    if json:
        print_json(found)
        return
    for name, value in brief(found).items():
        err.print(f"{name:>22}  {value}", soft_wrap=True)
    if tokens:
        print_table(
            "sampled tokens",
            "position id logprob",
            list(
                zip(
                    range(len(found.prompt_token_ids), 1 << 62),
                    found.completion_token_ids,
                    found.behaviour_logprobs,
                    strict=False,
                )
            ),
        )
    if wire:
        print(found.wire.request_body.decode("utf-8", "replace"))
        print(found.wire.response_body.decode("utf-8", "replace"))


def reconstruct(store: StoreOption, rollout: RolloutOption = None, json: JsonFlag = False) -> None:
    """Rebuild trajectories and account for every sampled token; exit code 1 if that does not add up."""
    reports, built = [], 0
    for r, found in _rollouts(store, rollout):
        from polar_mitm.reconstruct import build

        trajectories, report = build(found, rollout=r)
        built += len(trajectories)
        reports.append((r.rollout_id, len(trajectories), report))
    if json:
        print_json([{"rollout_id": i, "num_trajectories": n, "report": r} for i, n, r in reports])
    else:
        rows = [
            (i, n, r.num_calls, r.sampled, r.trained, r.num_masked, r.num_quarantined, _reasons(r))
            for i, n, r in reports
        ]
        columns = "rollout trajectories calls sampled trained masked quarantined reasons"
        print_table(f"{built} trajectories of {len(reports)} rollouts", columns, rows)
    if not all(r.adds_up for _, _, r in reports):
        fail("the account does not add up: sampled != trained + masked + quarantined", code=1)


def export(
    store: StoreOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The Parquet file to write.")],
    what: Annotated[str, typer.Option(help="trajectories or calls")] = "trajectories",
    rollout: RolloutOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: JsonFlag = False,
) -> None:
    """Write trajectories (ids, loss mask, behaviour logprobs) or calls to a Parquet file."""
    from polar_mitm.export import export_calls, export_trajectories
    from polar_mitm.reconstruct import build

    if what not in ("trajectories", "calls"):
        fail("--what is trajectories or calls")
    found = _rollouts(store, rollout)
    try:
        if what == "calls":
            num_rows = export_calls((c for _, calls in found for c in calls), out, force=force)
        else:
            built = (t for r, calls in found for t in build(calls, rollout=r)[0])
            num_rows = export_trajectories(built, out, force=force)
    except OSError as error:
        fail(f"cannot write {out}: {error}")
    if json:
        print_json({"path": out, "what": what, "num_rows": num_rows})
    else:
        say(f"{num_rows} {what} written to {out}")


def brief(call: ModelCall) -> dict[str, Any]:
    """A call without its bulk: counts in place of ids, no wire bodies."""
    bulk = ("prompt_token_ids", "completion_token_ids", "behaviour_logprobs", "upstream_body", "wire")
    out = {k: v for k, v in msgspec.to_builtins(call).items() if k not in bulk}
    out["num_prompt_tokens"] = len(call.prompt_token_ids)
    out["num_sampled_tokens"] = len(call.completion_token_ids)
    out["http_status"] = call.wire.status
    out["first_token_ms"] = _first_token_ms(call)
    out["tokens_per_s"] = _tokens_per_s(call)
    return out


def _rollouts(store: Path, rollout: str | None) -> Iterator[tuple[Any, list[ModelCall]]]:
    with reading(store) as reader:
        chosen = [r for r in reader.rollouts() if rollout in (None, r.rollout_id)]
        if not chosen:
            fail(f"no rollout {rollout} in {store}" if rollout else f"{store} holds no rollouts")
        for r in chosen:
            yield r, reader.calls(r.rollout_id)


def _reasons(report: Any) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in {**report.masked, **report.quarantined}.items())


def _first_token_ms(call: ModelCall) -> float | None:
    return None if call.first_token_at is None else round((call.first_token_at - call.started_at) * 1000, 1)


def _tokens_per_s(call: ModelCall) -> float | None:
    if call.first_token_at is None or call.ended_at is None or call.ended_at <= call.first_token_at:
        return None
    return round(len(call.completion_token_ids) / (call.ended_at - call.first_token_at), 1)


def clock(at: float | None) -> str:
    """A time of day for people."""
    return "" if at is None else datetime.fromtimestamp(at).strftime("%H:%M:%S")
