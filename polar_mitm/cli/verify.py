"""`polar-mitm verify`: trajectories hold what was sampled, and score again as they were sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from polar_mitm.cli import loop
from polar_mitm.cli.engine import probed
from polar_mitm.cli.exits import NO, SETUP, fail
from polar_mitm.cli.output import JsonFlag, err, print_json, progress
from polar_mitm.cli.reading import RolloutOption, chosen, reading
from polar_mitm.cli.verify_report import document, tell_reports
from polar_mitm.types import Rollout

if TYPE_CHECKING:
    from polar_mitm.store import StoreReader
    from polar_mitm.upstream.engine import EngineInfo
    from polar_mitm.verify import RolloutReport, Scorer

EXAMPLES = (
    "$ polar-mitm verify runs.duckdb\n\n"
    "$ polar-mitm verify runs.duckdb --engine managed\n\n"
    "$ polar-mitm verify runs.duckdb --model ./Qwen3-0.6B --json"
)
_MANAGED = "managed"


def verify(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The DuckDB file of a capture.")],
    rollout: RolloutOption = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", "-e", metavar="URL", help="Score on this vLLM; `managed` is our own."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", metavar="DIR", help="Score in torch with this Hugging Face folder."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Of --model.")] = "float32",
    weights: Annotated[
        str | None,
        typer.Option(metavar="MODEL@VERSION", help="Which of the recorded weights the scorer holds."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, metavar="NATS", help="Drift of a token; bfloat16 on one side needs some 0.2."),
    ] = 1e-3,
    json: JsonFlag = False,
) -> None:
    """Prove that each token trains under the context it was sampled under.

    Without an engine or a model: every trajectory is compared, id for id, with
    what the engine reported of its calls, and every sampled token accounted
    for. With one, trained tokens are scored again by teacher forcing, and the
    drift of their logprobs is told: max, mean and mismatch KL (Schulman's k3).

    Exit code 1 if a context differs, the account does not add up, or a token
    drifts beyond the tolerance. Calls sampled under other weights than the
    scorer's are counted apart and not scored.
    """
    if engine and model:
        fail("--engine or --model, not both")
    if not store.is_file():
        fail(f"there is no store {store}")
    with reading(store) as reader:
        rollouts = chosen(reader, rollout)
        info = probed(None if engine == _MANAGED else engine) if engine else None
        held = weights or _held(reader, rollouts, info, model)
        reports = loop.run(_verify(reader, rollouts, info, model, dtype, held, tolerance))
    sound = all(report.sound for report in reports)
    compared = any(report.calls for report in reports)
    if (engine or model) and not compared and any(report.trained for report in reports):
        sound = False
    if json:
        print_json(document(reports, sound, held, tolerance))
    else:
        tell_reports(reports, bool(engine or model), held, tolerance)
    if not sound:
        raise typer.Exit(NO)


async def _verify(
    reader: StoreReader,
    rollouts: list[Rollout],
    info: EngineInfo | None,
    model: Path | None,
    dtype: str,
    held: str | None,
    tolerance: float,
) -> list[RolloutReport]:
    """One rollout in memory at a time."""
    from polar_mitm.reconstruct import build
    from polar_mitm.verify import examine, sampled, score

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    reports = []
    async with _scorer(info, model, dtype) as scorer:
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            # A rollout's part of the bar is its trajectories' tokens'.
            task = bar.add_task("verifying", total=len(rollouts))
            for each in rollouts:
                calls = reader.calls(each.rollout_id)
                trajectories, account = build(calls, rollout=each)
                examined = examine(each.rollout_id, trajectories, account, map(sampled, calls))
                del calls
                num_tokens = sum(t.token_ids.size for t in trajectories)
                if scorer is None or not num_tokens:
                    bar.advance(task)
                else:
                    async for done in score(examined, scorer, held, tolerance):
                        bar.advance(task, done / num_tokens)
                reports.append(examined.finished())
    return reports


@asynccontextmanager
async def _scorer(info: EngineInfo | None, model: Path | None, dtype: str) -> AsyncIterator[Scorer | None]:
    if info is not None:
        from polar_mitm.verify import EngineScorer

        async with EngineScorer(info.url, info.model, info.max_model_len) as scorer:
            yield scorer
    elif model is not None:
        yield _InTorch(model, dtype)
    else:
        yield None


class _InTorch:
    """The trainer's scorer in a thread, one trajectory at a time."""

    def __init__(self, model: Path, dtype: str) -> None:
        if not (model / "config.json").is_file():
            fail(f"--model: {model} is no folder of a Hugging Face model (it has no config.json)")
        try:
            with progress(f"loading {model}"):
                from polar_mitm_trainer.scorer import TorchScorer
        except ImportError as error:
            fail(f"scoring in torch needs `pip install 'polar-mitm[train]'` ({error})", SETUP)
        try:
            self._scorer = TorchScorer(model, dtype)
        except (OSError, ValueError, AttributeError) as error:
            fail(f"--model: {model} cannot be loaded as {dtype}: {error}")
        self._one = asyncio.Lock()

    async def score(self, ids: Any) -> Any:
        from polar_mitm.verify import Unscorable

        async with self._one:
            try:
                return await asyncio.to_thread(self._scorer.score, ids)
            except ValueError as error:
                raise Unscorable(str(error)) from error


def _held(
    reader: StoreReader, rollouts: Iterable[Rollout], info: EngineInfo | None, model: Path | None
) -> str | None:
    """The weights that the scorer holds: the engine's own word; for a folder, the only ones recorded."""
    from polar_mitm.verify import weights_name

    if info is not None:
        return weights_name(info.model, info.policy_version)
    if model is None:
        return None
    wanted = {each.rollout_id for each in rollouts}
    rows = reader.sql(
        "SELECT DISTINCT rollout_id, model_served, policy_version FROM calls WHERE num_sampled > 0"
    )
    named = {
        weights_name(row["model_served"], row["policy_version"])
        for row in rows.to_pylist()
        if row["rollout_id"] in wanted
    }
    if len(named) > 1:
        fail(f"several weights are recorded; which does {model} hold? --weights {' | '.join(sorted(named))}")
    return next(iter(named), None)
