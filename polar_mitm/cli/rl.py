"""`polar-mitm rl`: a policy learns from rollouts of an unmodified harness, as they happen."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from polar_mitm.cli import loop
from polar_mitm.cli.engine import probed
from polar_mitm.cli.exits import ENGINE, SETUP, Interrupted, fail
from polar_mitm.cli.output import JsonFlag, plural, print_json, progress, say, tell
from polar_mitm.dialects.ids import new_id
from polar_mitm.errors import WeightsError

if TYPE_CHECKING:
    from polar_mitm.cli.groups import Harness
    from polar_mitm.cli.rl_config import EngineConfig, RlConfig
    from polar_mitm.cli.rl_loop import History
    from polar_mitm.config import Settings
    from polar_mitm.upstream.engine import EngineInfo
    from polar_mitm_trainer.reporting import Board
    from polar_mitm_trainer.rundb import RunDB
    from polar_mitm_trainer.worker import Worker

EXAMPLES = "$ polar-mitm rl fixtures/rl/pi.toml\n\n$ polar-mitm rl run.toml --resume"
STORE = "rollouts.duckdb"


def rl(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file (polar_mitm/cli/rl_config.py has its keys).")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the run's folder.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Train a policy online, through an unmodified harness.

    Starts an engine with the policy (or uses one), runs groups of rollouts on
    the tasks, trains on their rewards, brings the engine to the new weights,
    and again; before and after, the reward on held-out tasks. Rewards run here
    and not in the sandbox: one that executes what the agent wrote executes it
    on this machine. Ctrl-C leaves a checkpoint, and --resume goes on from it.

    The run's folder has rollouts.duckdb (every call of every rollout),
    run.duckdb (what each step was given), metrics.jsonl, tensorboard/,
    reward.png, checkpoints/step-N, worker.log.
    """
    from polar_mitm.cli.rl_config import RlConfig, load_toml, validated
    from polar_mitm.cli.train import need_torch
    from polar_mitm_trainer.worker import Worker

    told: RlConfig = validated(RlConfig, load_toml(config), config)
    need_torch()
    _check(told, resume)
    harness, settings = _ready(told)
    found = None if told.engine.url is None else _probed(told.engine.url)  # before a policy that takes long
    told.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_alone(told.out))
        with progress("loading the policy"):
            worker = Worker(told.train, told.out / "worker.log", num_processes=told.num_processes)
        stack.enter_context(worker)
        history = _begin(told, worker, resume)
        with nullcontext(found) if found else _engine(told, worker) as info:
            try:
                loop.run(_run(told, history, harness, settings, info, worker, resume))
            except WeightsError as error:
                fail(f"the engine refused an update: {error}; --resume goes on from the checkpoint", ENGINE)
            except Interrupted:
                say(f"stopped at step {history.iteration}; --resume goes on", style="yellow")
                raise
            finally:
                _write_trajectories(told)
    _tell(told, history, json)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The end of the command where another process works in this folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another polar-mitm rl works in {folder}")
        yield
    finally:
        os.close(descriptor)


def _check(config: RlConfig, resume: bool) -> None:
    """The end of the command where the run cannot be, before anything is started."""
    from polar_mitm import engine
    from polar_mitm.store.share import find_live
    from polar_mitm.tasks import load_tasks

    known = (config.out / "run.duckdb").exists()
    if known and not resume:
        fail(f"{config.out} holds a run already: --resume goes on with it, or give another out")
    if resume and not known:
        fail(f"--resume: {config.out} holds no run")
    if live := find_live((config.out / STORE).absolute()):
        fail(f"process {live.pid} records into {config.out / STORE}: this run goes on there")
    if config.engine.url is None and (running := engine.status()) is not None:
        fail(f"an engine runs already at {running.url}: polar-mitm engine down, or give its url", SETUP)
    load_tasks(config.rollouts.tasks, config.rollouts.split, config.seed)
    if config.evaluation.num_tasks:
        load_tasks(config.rollouts.tasks, config.evaluation.split, config.seed)


def _ready(config: RlConfig) -> tuple[Harness, Settings]:
    from polar_mitm.cli.groups import Harness
    from polar_mitm.cli.settings import settings_from

    harness = Harness.load(config.rollouts.harness, arguments=config.rollouts.arguments)
    given = {"max_tokens": config.rollouts.max_tokens, **config.rollouts.settings}
    settings = settings_from(None, "rollouts.settings", **given)
    return harness, harness.served(settings)


def _probed(url: str) -> EngineInfo:
    info = probed(url)
    if not info.weight_version:
        fail(f"the engine at {url} takes no new weights: start it with VLLM_SERVER_DEV_MODE=1", ENGINE)
    return info


def _begin(config: RlConfig, worker: Worker, resume: bool) -> History:
    """Where the run is; what it has recorded after that is forgotten, since it comes again."""
    from polar_mitm.cli.rl_loop import History
    from polar_mitm_trainer.rundb import RunDB, differences

    if not resume:
        return History()
    position = worker.resume(config.out / "checkpoints")
    if position is None:
        say(f"{config.out} has no checkpoint yet: beginning anew", style="yellow")
        return History()
    *_, then = RunDB.recorded(config.out)
    if changed := differences(then, config.model_dump(mode="json")):
        say(f"from here on with other options: {'; '.join(changed)}", style="yellow")
    version = worker.version()
    say(f"going on after step {position['iteration']}, with step-{version}")
    return History(**position, version=version, saved=version)


@contextmanager
def _engine(config: RlConfig, worker: Worker) -> Iterator[EngineInfo]:
    """An engine that is started, and stopped with the run unless it is to be kept."""
    from polar_mitm import engine

    told: EngineConfig = config.engine
    lora = config.policy.lora
    model = config.policy.model
    if lora is None:  # as the learner has it: an engine cannot take new weights with tied embeddings
        folder = (config.out / "weights" / "initial" / Path(config.policy.model).name).absolute()
        worker.export(folder)
        model = str(folder)
    with progress() as step:
        state = engine.up(
            model=model,
            dtype=config.engine_dtype,
            max_model_len=told.max_model_len,
            tool_call_parser=told.tool_call_parser,
            dev=True,
            lora=lora.rank if lora else 0,
            transfer=config.sync.via == "transfer",
            extra=told.extra,
            on_step=step,
        )
    try:
        yield _probed(state.url)
    finally:
        if not told.keep:
            engine.down()


async def _run(
    config: RlConfig,
    history: History,
    harness: Harness,
    settings: Settings,
    info: EngineInfo,
    worker: Worker,
    resume: bool,
) -> None:
    from polar_mitm.cli.groups import GroupRunner
    from polar_mitm.cli.hosting import counting, embedded
    from polar_mitm.cli.rl_loop import RlLoop
    from polar_mitm.cli.rl_sync import LORA, Sync
    from polar_mitm.upstream.weights import EngineWeights

    adapter = config.policy.lora is not None
    served = msgspec.structs.replace(info, model=LORA) if adapter else info
    told = config.rollouts
    store = (config.out / STORE).absolute()
    async with embedded(settings, served, store) as host:
        if host.store != store:
            fail(f"{store} is being written by another process: this run would not be in it")
        changed = host.interceptor.capture.policy_changed
        async with (
            EngineWeights(info.url, info.model, told=changed) as weights,
            GroupRunner(host, harness, concurrency=told.concurrency, timeout_s=told.timeout_s) as runner,
            _recorded(config, history, resume) as (db, board),
            counting(
                host,
                f"{told.harness}, {plural(config.steps, 'step')}",
                lambda: f"step {history.iteration + 1}/{config.steps}",
            ),
        ):
            tolerance = config.tolerance if config.sync.verify else None
            folder = (config.out / "weights").absolute()
            via = "adapter" if adapter else config.sync.via
            sync = Sync(weights, worker, folder, via=via, tolerance=tolerance)
            await RlLoop(
                config,
                history,
                store=host.store,
                runner=runner,
                worker=worker,
                sync=sync,
                db=db,
                board=board,
            ).run()


@asynccontextmanager
async def _recorded(config: RlConfig, history: History, resume: bool) -> AsyncIterator[tuple[RunDB, Board]]:
    """The run's database and board; how it ended is in them afterwards, and the curves are drawn."""
    from polar_mitm_trainer.reporting import Board, draw
    from polar_mitm_trainer.rundb import RunDB

    db = RunDB(config.out, RunDB.last_run(config.out) if resume else new_id())
    name = config.name or config.out.name
    db.begin("rl", name, config.model_dump(mode="json"), config.out / STORE)
    db.rewind(history.iteration)
    board = Board(config.out / "tensorboard")
    status = "failed"
    try:
        yield db, board
        status = "done"
    except asyncio.CancelledError:
        status = "stopped"
        raise
    finally:
        board.close()
        db.end(status)
        curves = {"training": db.series("reward/mean"), "held out": db.series("evaluation/reward")}
        draw(config.out / "reward.png", curves, title=name)


def _write_trajectories(config: RlConfig) -> None:
    """So that a step's rows lead to calls and wire by joins; nobody records any more."""
    from polar_mitm.cli.trajectories import write_trajectories
    from polar_mitm.store import open_reader
    from polar_mitm_trainer.listing import unbuilt

    store = config.out / STORE
    if not store.exists():
        return
    with open_reader(store) as reader:
        missing = set(unbuilt(reader, config.rollouts.builder))
    if missing:
        write_trajectories(store, config.rollouts.builder, missing)


def _tell(config: RlConfig, history: History, json: bool) -> None:
    from polar_mitm_trainer.rundb import RunDB

    out = config.out
    db = RunDB(out, RunDB.last_run(out))
    steps, rewards = db.series("reward/mean")
    held_out = dict(zip(*db.series("evaluation/reward"), strict=True))
    errors = dict(zip(*db.series("evaluation/stderr"), strict=True))
    before, after = (
        {"reward": held_out[at], "stderr": errors.get(at)} if at in held_out else None
        for at in (0, history.iteration)
    )
    checkpoint = out / "checkpoints" / history.policy_version
    if json:
        print_json(
            {
                "out": out,
                "run_id": db.run_id,
                "steps": history.iteration,
                "policy_version": history.policy_version,
                "before": before,
                "after": after,
                "rewards": dict(zip(steps, rewards, strict=True)),
                "evaluations": held_out,
                "checkpoint": checkpoint,
                "store": out / STORE,
                "curve": out / "reward.png",
            }
        )
        return
    if not history.version:
        say("nothing was learned: in no group were the rewards unequal", style="yellow")
    if rewards:
        tell(f"reward in training: {rewards[0]:.3f} at first, {rewards[-1]:.3f} at last")
    if before and after:
        tell(f"held out: {before['reward']:.3f} before, {after['reward']:.3f} after")
    tell(f"{checkpoint}  {out / 'reward.png'}")
