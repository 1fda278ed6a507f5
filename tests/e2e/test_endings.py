"""Runs that end badly: the engine dies, a person interrupts, the time is up. Nothing hangs, nothing stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from polar_mitm.types import ModelCall, Rollout
from tests.e2e.conftest import Cli, Ended, Started, until
from tests.e2e.engines import HarnessEngine, droning
from tests.support.record_fixtures import HARNESSES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
CLAUDE = HARNESSES["claude-code"]


def recorded(store: Path) -> tuple[Rollout, list[ModelCall]]:
    """The only rollout, of which every token is accounted for, and its calls."""
    with open_reader(store) as reader:
        (rollout,) = reader.rollouts()
        calls = reader.calls(wire=True)
    assert rollout.ended_at is not None and rollout.incomplete is None
    _, report = build(calls, rollout=rollout)
    assert report.adds_up
    return rollout, calls


async def begun(engine: HarnessEngine, run: Started) -> None:
    """The engine has sent tokens to the harness."""
    await until(
        lambda: any(len(call.sent_token_ids) > 20 and call.request.get("tools") for call in engine.asked),
        "a streaming call",
        run,
    )


@pytest.mark.parametrize("name", ["claude-code", "codex", "pi", "opencode"])
async def test_engine_dies(name: str, cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "run.duckdb"
    async with HarnessEngine(droning) as engine:
        run = await cli.run(
            "--store", store, "--engine", engine.url, "--timeout", 45, command=HARNESSES[name]
        )
        await begun(engine, run)
    done = await run.ended()  # it tried again, in vain

    assert done.code != 0
    rollout, calls = recorded(store)
    assert rollout.status in ("timeout", "failed")
    first, *others = [call for call in calls if call.role == "main"]
    assert first.status == "failed" and first.wire.status == 200  # what had begun ends with an error event
    error_event = b'{"type":"response.failed"' if name == "codex" else b"event: error\n"
    assert error_event in first.wire.response_body
    (sent,) = [c.sent_token_ids for c in engine.asked if c.prompt_token_ids == list(first.prompt_token_ids)]
    assert first.completion_token_ids == sent[: len(first.completion_token_ids)] != []
    assert others
    overloaded = 503 if name == "codex" else 529
    for call in others:
        assert call.completion_token_ids == []
        if call.status != "cancelled":  # by the deadline
            assert (call.status, call.wire.status) == ("failed", overloaded)
            assert call.wire.method == "WS" or "retry-after" in dict(call.wire.response_headers)
    assert run.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted(number: int, cli: Cli, tmp_path: Path) -> None:
    store, task = tmp_path / "run.duckdb", tmp_path / "task"
    task.mkdir()
    async with HarnessEngine(droning) as engine:
        run = await cli.run("--store", store, "--engine", engine.url, command=CLAUDE, task=task)
        await begun(engine, run)
        assert run.leftovers() != []  # there is something to leave behind
        run.interrupt(number)
        done = await run.ended()
        await engine.asked[0].ended.wait()

    assert done.code == 128 + number, done.err
    check_cut_short(run, done, engine, store, "interrupted")
    assert task.stat().st_uid == os.getuid()  # what was lent to the harness is given back


async def test_timeout(cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "run.duckdb"
    async with HarnessEngine(droning) as engine:
        run = await cli.run("--store", store, "--engine", engine.url, "--timeout", 12, command=CLAUDE)
        await begun(engine, run)
        done = await run.ended()
        await engine.asked[0].ended.wait()

    assert done.code == 124, done.err  # as timeout(1)
    check_cut_short(run, done, engine, store, "timeout")


def check_cut_short(run: Started, done: Ended, engine: HarnessEngine, store: Path, status: str) -> None:
    rollout, (call,) = recorded(store)
    assert rollout.status == status and rollout.stop_reason
    assert (call.status, call.delivered, call.finish_reason) == ("cancelled", False, None)
    # The generation was cancelled at the engine, and what it had sampled by then is kept.
    assert engine.asked[0].outcome == "cancelled"
    sampled = call.completion_token_ids
    assert sampled == engine.asked[0].completion_token_ids[: len(sampled)] != []
    assert len(call.behaviour_logprobs) == len(sampled)
    assert run.leftovers() == []
