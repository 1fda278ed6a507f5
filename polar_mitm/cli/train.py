"""`polar-mitm train` and `polar-mitm sft`: batch jobs over a recorded store, in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polar_mitm.cli.exits import Interrupted, fail
from polar_mitm.cli.output import JsonFlag, err, plural, print_json, say, tell
from polar_mitm.cli.reading import BuilderName, BuilderOption, StoreOption, reading
from polar_mitm.errors import SetupError

if TYPE_CHECKING:
    from polar_mitm_trainer.batch import StepDone, Summary

TRAIN_EXAMPLES = (
    "$ polar-mitm train -s runs.duckdb --model ./Qwen3-0.6B --out runs/first\n\n"
    "$ polar-mitm train -s runs.duckdb --model ./Qwen3-0.6B --out runs/dapo --loss dapo --epochs 2 --query "
    "\"SELECT trajectory_id FROM trajectories WHERE builder = 'forest' AND role = 'main'\"\n\n"
    "$ torchrun --nproc-per-node 8 --no-python polar-mitm train -s runs.duckdb ..."
)
SFT_EXAMPLES = (
    "$ polar-mitm sft -s runs.duckdb --model ./Qwen3-0.6B --out runs/warm --min-reward 1\n\n"
    "$ polar-mitm sft -s runs.duckdb --model ./Qwen3-0.6B --out runs/warm --resume --epochs 4"
)
_MISSING = "training needs torch and transformers: pip install 'polar-mitm[train]'"

QueryOption = Annotated[
    str,
    typer.Option(
        metavar="SQL",
        help="SELECT trajectory_id[, reward][, group_id] over the store's views; @FILE; all; or a name of "
        "--sets.",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", metavar="DIR", help="Hugging Face folder or name to train.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The run's folder.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="TOML with [policy] [optimiser] [advantage] [loss] [packing] (trainer/config.py).",
    ),
]
RewardOption = Annotated[
    str | None,
    typer.Option("--reward", metavar="NAME", help="Which verdict; else the only one, or 'reward'."),
]
GroupsOption = Annotated[int, typer.Option(min=1, metavar="N", help="Groups in an optimiser step.")]
StepsOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Optimiser steps in all; else what --epochs makes.")
]
EpochsOption = Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the training set.")]
EveryOption = Annotated[
    int, typer.Option(min=0, metavar="N", help="Steps between checkpoints; the last is always kept.")
]
SkipOption = Annotated[
    bool,
    typer.Option(
        "--skip-refused", help="Leave out and count what cannot be trained on; else it is an error."
    ),
]
ServedOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The model's name at the engine; what another one sampled is refused."),
]
SetsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help='TOML of names for --query: NAME = "SELECT ...".')
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where the run in --out ended.")]


def train(
    store: StoreOption,
    out: OutOption,
    model: ModelOption = None,
    query: QueryOption = "all",
    config: ConfigOption = None,
    loss: Annotated[
        str | None, typer.Option(metavar="NAME", help="grpo, dr_grpo, dapo, gspo or cispo; else --config's.")
    ] = None,
    reward: RewardOption = None,
    builder: BuilderOption = BuilderName.forest,
    groups_per_step: GroupsOption = 8,
    steps: StepsOption = None,
    epochs: EpochsOption = 1,
    checkpoint_every: EveryOption = 10,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the order; else --config's.")] = None,
    skip_refused: SkipOption = False,
    served_as: ServedOption = None,
    sets: SetsOption = None,
    resume: ResumeOption = False,
    json: JsonFlag = False,
) -> None:
    """Train a policy on recorded rollouts, as a batch job.

    The training set is what --query selects, pinned in the run's folder with
    the rows of every step, which lead back to the wire. Trajectories that are
    not in the store yet are written first. Ctrl-C ends after the step that is
    being done, with a checkpoint; again, at once. --resume goes on to the bit.

    In --out: checkpoints/step-N (Hugging Face folders), run.duckdb,
    metrics.jsonl, tensorboard/, reward.png.
    """
    given = _config(config, model, seed, {"name": loss} if loss else {})
    if given.loss.name == "sft":
        fail("the loss sft goes with another choice of rollouts: `polar-mitm sft`")
    _run(
        {
            "kind": "train",
            "store": store,
            "query": query,
            "out": out,
            "builder": builder.value,
            "reward_name": reward,
            "skip_refused": skip_refused,
            "served_as": served_as,
            "sets": sets,
            "groups_per_step": groups_per_step,
            "num_steps": steps,
            "num_epochs": epochs,
            "checkpoint_every": checkpoint_every,
            "resume": resume,
        },
        given,
        json,
    )


def sft(
    store: StoreOption,
    out: OutOption,
    model: ModelOption = None,
    query: QueryOption = "all",
    min_reward: Annotated[
        float, typer.Option(metavar="R", help="What a rollout must have earned to be accepted.")
    ] = 1.0,
    config: ConfigOption = None,
    reward: RewardOption = None,
    builder: BuilderOption = BuilderName.forest,
    groups_per_step: GroupsOption = 8,
    steps: StepsOption = None,
    epochs: EpochsOption = 1,
    checkpoint_every: EveryOption = 10,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the order; else --config's.")] = None,
    skip_refused: SkipOption = False,
    served_as: ServedOption = None,
    sets: SetsOption = None,
    resume: ResumeOption = False,
    json: JsonFlag = False,
) -> None:
    """Fine-tune on the recorded rollouts that earned enough.

    Rejection sampling: the loss is the negative logprob of each sampled token
    that trains, in the context that it was sampled in; all tokens weigh the
    same. The rest is as in `train`.
    """
    given = _config(config, model, seed, {"name": "sft"})
    _run(
        {
            "kind": "sft",
            "store": store,
            "query": query,
            "out": out,
            "builder": builder.value,
            "reward_name": reward,
            "skip_refused": skip_refused,
            "served_as": served_as,
            "sets": sets,
            "min_reward": min_reward,
            "groups_per_step": groups_per_step,
            "num_steps": steps,
            "num_epochs": epochs,
            "checkpoint_every": checkpoint_every,
            "resume": resume,
        },
        given,
        json,
    )


def need_torch() -> None:
    """Raises SetupError where training cannot be done here."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise SetupError(_MISSING)


def _config(file: Path | None, model: str | None, seed: int | None, loss: dict[str, Any]) -> Any:
    from polar_mitm.cli.rl_config import check_loss, load_toml, validated
    from polar_mitm_trainer.config import TrainConfig

    given = load_toml(file) if file else {}
    options: dict[str, dict[str, Any]] = {"policy": {"model": model} if model else {}, "loss": loss}
    for name, table in options.items():
        if not isinstance(given.setdefault(name, {}), dict):
            fail(f"{file}: {name} is a table: [{name}], not {name} = {given[name]!r}")
        given[name] |= table
    if not given["policy"].get("model"):
        fail("say what to train: --model DIR, or [policy] model in --config")
    if seed is not None:
        given["seed"] = seed
    told = validated(TrainConfig, given, file or "options")
    try:
        check_loss(told.loss)
    except ValueError as error:
        fail(str(error))
    if told.loss.max_staleness is not None:
        fail("loss.max_staleness: recorded rollouts have no step that they could be older than; leave it out")
    return told


def _run(job: dict[str, Any], config: Any, json: bool) -> None:
    need_torch()
    from polar_mitm_trainer.batch import BatchJob, BatchRun
    from polar_mitm_trainer.data import resolve_query
    from polar_mitm_trainer.distributed import Distributed

    job["query"] = resolve_query(job["query"], builder=job["builder"], sets=job.pop("sets"))
    first = os.environ.get("RANK", "0") == "0"
    if first:
        _write_trajectories(job["store"], job["builder"])
    distributed = Distributed.from_environment(config.policy.device)
    distributed.gather(None)  # the trajectories are there
    try:
        run = BatchRun(BatchJob(**job, config=config), distributed)
        with _stopping(run) as came, _bar(first) as on_step:
            summary = run.run(on_step)
    except SetupError:
        raise
    except ValueError as error:  # a step, a checkpoint, a trajectory that is too long: each says what
        fail(str(error))
    finally:
        distributed.close()
    if first:
        _tell(summary, job["out"], json and not came)
    if came:
        raise Interrupted(came[0])


def _write_trajectories(store: Path, builder: str) -> None:
    from polar_mitm.cli.trajectories import write_trajectories
    from polar_mitm_trainer.data import unbuilt

    with reading(store) as reader:
        missing = unbuilt(reader, builder)
    if missing:
        say(f"writing the trajectories of {plural(len(missing), 'rollout')} into {store}")
        write_trajectories(store, builder, set(missing))


@contextmanager
def _stopping(run: Any) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the run after its step; the second time at once. Which came."""
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        if came:
            raise Interrupted(number)
        came.append(number)
        say("stopping after this step; again to stop at once", style="yellow")
        run.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar(first: bool) -> Iterator[Any]:
    """A progress bar on a terminal, a line per step elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True, disable=not (first and err.is_terminal)) as bar:
        task = bar.add_task("training", total=None)

        def on_step(done: StepDone) -> None:
            say(_line(done))
            bar.update(task, completed=done.step, total=done.num_steps)

        yield on_step


def _line(done: StepDone) -> str:
    found = done.metrics
    of = f"/{done.num_steps}" if done.num_steps else ""
    mismatch = found.get("train/mismatch_abs")
    return (
        f"step {done.step}{of}  reward {found['reward/mean']:.3f}  loss {found['train/loss']:.4f}  "
        f"{found['tokens/trained']:,.0f} tokens  {found['time/step']:.1f} s"
        + (f"  mismatch {mismatch:.2g}" if mismatch is not None else "")
    )


def _tell(summary: Summary, out: Path, json: bool) -> None:
    if json:
        print_json({"out": out, **asdict(summary)})
        return
    if summary.refused:
        say("refused: " + ", ".join(f"{n} {why}" for why, n in summary.refused.items()), style="yellow")
    if summary.left_out:
        say("left out: " + ", ".join(f"{n} {why}" for why, n in summary.left_out.items()), style="yellow")
    if summary.set_aside:
        say(f"never in a step: {summary.set_aside}", style="yellow")
    tell(
        f"{plural(summary.steps, 'step')} on {plural(summary.num_groups, 'group')} of "
        f"{plural(summary.num_trajectories, 'trajectory', 'trajectories')}"
        + (f" of {summary.model!r}" if summary.model else "")
        + f", snapshot {summary.snapshot_id[:12]}"
        + ("; stopped, --resume goes on" if summary.stopped else "")
    )
    tell(f"{summary.checkpoint}")
