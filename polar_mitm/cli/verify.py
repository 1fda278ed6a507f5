"""`polar-mitm verify`: trajectories hold what was sampled, and score again as they were sampled."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from polar_mitm.cli import loop
from polar_mitm.cli.engine import probed
from polar_mitm.cli.exits import NO, SETUP, fail
from polar_mitm.cli.output import JsonFlag, err, print_json, progress
from polar_mitm.cli.reading import BuilderName, BuilderOption, RolloutOption, chosen, reading
from polar_mitm.cli.verify_input import Source, input_of
from polar_mitm.cli.verify_report import Found, tell_found
from polar_mitm.errors import StoreError
from polar_mitm.types import Rollout

if TYPE_CHECKING:
    from polar_mitm.reconstruct import Builder
    from polar_mitm.store import StoreReader
    from polar_mitm.store.seal import SealCheck
    from polar_mitm.upstream.engine import EngineInfo
    from polar_mitm.verify import RolloutReport, Scorer

EXAMPLES = (
    "$ polar-mitm verify runs.duckdb\n\n"
    "$ polar-mitm verify runs.duckdb --engine managed\n\n"
    "$ polar-mitm verify runs.duckdb --model ./Qwen3-0.6B --json"
)


def verify(
    store: Annotated[
        Path | None, typer.Argument(metavar="STORE", help="The DuckDB file of a capture.")
    ] = None,
    named: Annotated[
        Path | None,
        typer.Option("--store", "-s", metavar="FILE", help="The same, as other commands take it."),
    ] = None,
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
    builder: BuilderOption = BuilderName.forest,
    weights: Annotated[
        str | None,
        typer.Option(metavar="MODEL@VERSION", help="Which of the recorded weights the scorer holds."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, metavar="NATS", help="Drift of a token; bfloat16 on one side needs some 0.2."),
    ] = 1e-3,
    seal: Annotated[
        bool, typer.Option("--seal", help="Check seals too, and name the first record that was changed.")
    ] = False,
    digest: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="With --seal: what `seal` printed; no newer seal passes for it."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Prove that each token trains under the context it was sampled under.

    Without an engine or a model: every trajectory (as `reconstruct --write`
    stored it, else as it is built now) is compared, id for id, with what the
    engine reported of its calls, and every sampled token accounted for. With
    one, trained tokens are scored again by teacher forcing, and the drift of
    their logprobs is told: max, mean and mismatch KL (Schulman's k3).

    Exit code 1 if a context differs, the account does not add up, a token
    drifts beyond the tolerance, the record has lost something, or a seal is
    broken or missing. Calls sampled under other weights than the scorer's, or
    under a grammar, are counted apart and not scored.
    """
    if engine and model:
        fail("--engine or --model, not both")
    if digest and not seal:
        fail("--digest goes with --seal")
    if (store is None) == (named is None):
        fail("name the store once: polar-mitm verify STORE")
    with reading(store or named or Path()) as reader:
        rollouts = chosen(reader, rollout)
        if digest and len(rollouts) != 1:
            fail("--digest is of one rollout: name it with --rollout")
        seals = _check_seals(reader, rollouts, digest) if seal else []
        info = probed(engine) if engine else None
        held = weights or _held(reader, rollouts, info, model)
        scoring = _scorer(info, model, dtype)
        options = {"weights": held, "tokenizer": info.tokenizer if info else "", "tolerance": tolerance}
        found = Found(
            builder=builder,
            reports=loop.run(_verify(reader, rollouts, builder.value, scoring, options)),
            seals=seals,
            scored=bool(engine or model),
            weights=held,
            tolerance=tolerance,
        )
    if json:
        print_json(found.document())
    else:
        tell_found(found)
    if not found.sound:
        raise typer.Exit(NO)


async def _verify(
    reader: StoreReader,
    rollouts: list[Rollout],
    builder: Builder,
    scoring: AbstractAsyncContextManager[Scorer | None],
    options: dict[str, Any],
) -> list[tuple[Source, RolloutReport]]:
    """One rollout in memory at a time; `options` are those of `Examination`."""
    from polar_mitm.store.columns import each_rollout
    from polar_mitm.verify import Examination, score

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    reports = []
    columns_of = each_rollout(reader, [each.rollout_id for each in rollouts])
    async with scoring as scorer:
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("verifying", total=len(rollouts))
            for number, (each, calls) in enumerate(zip(rollouts, columns_of, strict=True), 1):
                given = input_of(reader, each, calls, builder, wire=scorer is not None)
                examination = Examination(
                    each.rollout_id,
                    given.calls,
                    num_unreadable=given.num_unreadable,
                    holes=given.holes,
                    **options,
                )
                try:
                    async for done in score(examination, given.paths, scorer):
                        bar.advance(task, done / given.num_paths)
                except StoreError as error:  # a stored trajectory, or the account of them, is damaged
                    examination.damaged(str(error))
                bar.update(task, completed=number)
                reports.append((given.source, examination.finished(given.account)))
    return reports


def _check_seals(reader: StoreReader, rollouts: Iterable[Rollout], digest: str | None) -> list[SealCheck]:
    from polar_mitm.store.seal import verify_seal

    return [verify_seal(reader, each.rollout_id, digest) for each in rollouts]


@asynccontextmanager
async def _scorer(info: EngineInfo | None, model: Path | None, dtype: str) -> AsyncIterator[Scorer | None]:
    if info is not None:
        from polar_mitm.verify import EngineScorer

        async with EngineScorer(info.url, info.model, info.max_model_len) as scorer:
            yield scorer
    elif model is not None:
        from polar_mitm.engine.build import clean_environment
        from polar_mitm.verify import ProcessScorer

        with progress(f"loading {model}"):
            in_torch = await ProcessScorer(torch_command(model, dtype), clean_environment()).__aenter__()
        try:
            yield in_torch
        finally:
            await in_torch.__aexit__(None, None, None)
    else:
        yield None


def torch_command(model: Path, dtype: str) -> list[str]:
    """The trainer's scorer, on this Python where it has torch, else on that of the managed engine."""
    from polar_mitm.cache import default_cache
    from polar_mitm.engine import ensure_env, is_installed

    if not (model / "config.json").is_file():
        fail(f"--model: {model} is no folder of a Hugging Face model (it has no config.json)")
    script = find_spec("polar_mitm_trainer.scorer")
    if script is None or script.origin is None:
        fail("the trainer is not installed: install polar-mitm again", SETUP)
    if find_spec("torch") and find_spec("transformers"):
        python = Path(sys.executable)
    elif is_installed(default_cache()):
        python = ensure_env(default_cache(), lambda step: None)
    else:
        fail("scoring in torch needs `pip install 'polar-mitm[train]'` or a `polar-mitm engine up`", SETUP)
    return [str(python), "-P", script.origin, str(model.absolute()), dtype]


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
