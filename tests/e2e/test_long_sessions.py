"""Long sessions of the real harnesses: each thread is one trajectory, on exactly the sampled ids.

Qwen Code and Gemini CLI may change what was said, or the system prompt, when a new process goes on with a
conversation: then it begins a trajectory.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from polar_mitm import engine
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from polar_mitm.types import ModelCall
from tests.e2e.conftest import Cli, sampled
from tests.e2e.engines import HarnessEngine
from tests.e2e.sessions import (
    HARNESSES,
    NUM_CALLS,
    NUM_TOOL_TURNS,
    PROMPTS,
    in_front_of,
    looking,
    made_to_look,
    made_to_speak,
    session,
)

REWRITERS = {"qwen-code": {"history_edited"}, "gemini-cli": {"system_changed", "history_edited"}}
BEGINNINGS = [0, *accumulate(num + 1 for num in NUM_TOOL_TURNS[:-1])]
"""The calls that are a process's first."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
each_harness = pytest.mark.parametrize("name", HARNESSES)


@each_harness
async def test_a_thread_is_one_trajectory(name: str, cli: Cli, tmp_path: Path) -> None:
    """Three processes, eight calls, answers that no template would write: no fork."""
    store = tmp_path / "run.duckdb"
    async with HarnessEngine(looking) as scripted:
        await run_session(name, scripted.url, cli, store)
    calls = await check(cli, store)
    sampled = {tuple(c.prompt_token_ids): c.completion_token_ids for c in scripted.asked}
    assert {tuple(c.prompt_token_ids): c.completion_token_ids for c in calls} == sampled
    assert any("retokenised" in call.edits for call in calls)  # what a rendering would have changed


@each_harness
async def test_a_thread_of_a_real_model(
    name: str, cli: Cli, vllm: engine.EngineState, tmp_path: Path
) -> None:
    store = tmp_path / "run.duckdb"
    async with in_front_of(vllm.url, made_to_look) as url:
        await run_session(name, url, cli, store, "--max-tokens", 256)
    await check(cli, store)


# Qwen Code says 27,000 tokens at first, and scoring them takes minutes; it says them to the model above.
@pytest.mark.parametrize("name", [name for name in HARNESSES if name != "qwen-code"])
async def test_what_a_real_model_says_scores_as_it_was_sampled(
    name: str, cli: Cli, vllm: engine.EngineState, tmp_path: Path
) -> None:
    """Three processes, three calls, no grammar; float32 on both sides.

    The cap is far beyond what it says: Codex and Pi do not go on from an answer that was cut off.
    """
    store = tmp_path / "run.duckdb"
    async with in_front_of(vllm.url, made_to_speak) as url:
        await run_session(name, url, cli, store, "--max-tokens", 1024)
    calls = await check(cli, store, len(PROMPTS))

    done = await cli("verify", store, "--engine", vllm.url, "--json")
    verified = done.json()
    assert done.code == 0, verified
    [rollout], drift = verified["rollouts"], verified["drift"]
    print(name, drift)
    sampled = sum(len(call.completion_token_ids) for call in calls if call.role == "main")
    assert rollout["unscored"] == {} and rollout["accounted"] and verified["context_equality"] == 1.0
    assert drift["num_tokens"] == drift["num_kl_tokens"] == rollout["trained"] == sampled
    assert 0 < drift["max"] < 1e-3 and 0 <= drift["kl"] < 1e-6


async def run_session(name: str, url: str, cli: Cli, store: Path, *options: object) -> None:
    # In shares of the window that Gemini CLI believes in, this is much, and it would compact.
    cli.env["POLAR_MITM_USAGE"] = "engine"
    given = ["--store", store, "--engine", url, "--harness", name, *options]
    done = await (await cli.run(*given, command=session(name))).ended(300)
    assert done.code == 0, done.err


async def check(cli: Cli, store: Path, num_calls: int = NUM_CALLS) -> list[ModelCall]:
    """One thread, continued call by call; every token accounted for, in the context it was sampled in."""
    with open_reader(store) as reader:
        (rollout,) = reader.rollouts()
        calls = sampled(reader.calls())
    assert (rollout.status, rollout.incomplete) == ("completed", None)
    assert all(call.status == "ok" and call.delivered for call in calls)
    thread = [call for call in calls if call.role == "main"]
    assert len(thread) == num_calls
    # With one call per process, each call is a process's first.
    firsts = BEGINNINGS if num_calls == NUM_CALLS else range(num_calls)
    breaks = []
    for at, (parent, call) in enumerate(pairwise(thread), 1):
        if at in firsts and call.continuation == "none":
            assert call.fallback in REWRITERS[rollout.harness]
            breaks.append(at)
            continue
        assert call.fallback is None
        assert (call.continuation, call.parent_call_id) == ("exact", parent.call_id)
        known = [*parent.prompt_token_ids, *parent.completion_token_ids]
        assert list(call.prompt_token_ids)[: len(known)] == known

    trajectories, report = build(calls, rollout=rollout)
    main = [t for t in trajectories if t.role == "main"]
    bounds = pairwise([0, *breaks, num_calls])
    parts = [[call.call_id for call in thread[begin:end]] for begin, end in bounds]
    assert sorted([span.call_id for span in t.spans] for t in main) == sorted(parts)
    assert len(trajectories) == len(main) + len(calls) - len(thread)  # side calls stay alone
    assert report.adds_up and report.trained == sum(len(call.completion_token_ids) for call in thread)
    assert sum(t.loss_mask.sum() for t in main) == report.trained

    verified = (await cli("verify", store, "--json")).json()
    assert verified["sound"] and verified["context_equality"] == 1.0
    return calls
