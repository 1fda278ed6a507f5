"""What breaks or interleaves a harness's threads: each thread is found, and a break has a reason."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from polar_mitm.conformance.scripts import Script
from polar_mitm.reconstruct import BuildReport, Trajectory, build
from polar_mitm.store import open_reader
from polar_mitm.types import ModelCall
from tests.e2e.conftest import Cli, sampled
from tests.e2e.engines import HarnessEngine
from tests.e2e.sessions import DELEGATE, Overflowing, delegating, garbling

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
NAMED = ("claude-code", "codex", "opencode", "qwen-code")
"""Harnesses that say which of their agents calls."""


async def recorded(
    name: str, script: Script, prompt: str, cli: Cli, store: Path, exit_code: int = 0
) -> tuple[list[ModelCall], list[Trajectory], BuildReport]:
    """One run, and what becomes of it."""
    async with HarnessEngine(script) as engine:
        run = await cli.start(
            "run", "--store", store, "--engine", engine.url, "--harness", name, "--prompt", prompt
        )
        done = await run.ended()
    assert done.code == exit_code, done.err
    with open_reader(store) as reader:
        (rollout,) = reader.rollouts()
        calls = sampled(reader.calls())
    trajectories, report = build(calls, rollout=rollout)
    assert report.adds_up and rollout.incomplete is None
    verified = (await cli("verify", store, "--json")).json()
    assert verified["sound"] and verified["context_equality"] == 1.0
    return calls, list(trajectories), report


@pytest.mark.parametrize("name", NAMED)
async def test_subagents_side_by_side(name: str, cli: Cli, tmp_path: Path) -> None:
    """Same task, same answers, same prompt ids: only the ids that we minted tell the two apart."""
    calls, trajectories, report = await recorded(name, delegating, DELEGATE, cli, tmp_path / "run.duckdb")
    threads: dict[str, list[ModelCall]] = {}
    for call in calls:
        if call.role != "auxiliary":
            threads.setdefault(call.agent_id or "", []).append(call)
    roles = [[c.role for c in thread] for thread in threads.values()]
    assert sorted(roles) == [["main"] * (3 if name == "codex" else 2), *[["subagent"] * 3] * 2]
    for thread in threads.values():
        assert [c.fallback for c in thread] == ["first_call"] + [None] * (len(thread) - 1)
        for parent, call in pairwise(thread):
            assert (call.continuation, call.parent_call_id) == ("exact", parent.call_id)
    first, second = (t for t in threads.values() if t[0].role == "subagent")
    assert list(first[0].prompt_token_ids) == list(second[0].prompt_token_ids)
    assert first[0].completion_token_ids == second[0].completion_token_ids

    paths = [[span.call_id for span in t.spans] for t in trajectories if t.role != "auxiliary"]
    assert sorted(paths) == sorted([c.call_id for c in thread] for thread in threads.values())
    assert report.trained == sum(len(c.completion_token_ids) for t in threads.values() for c in t)


async def test_subagents_that_nobody_names(cli: Cli, tmp_path: Path) -> None:
    """Gemini CLI's are told by what they are offered, and one from the other by the ids that we minted."""
    store = tmp_path / "run.duckdb"
    calls, trajectories, _ = await recorded("gemini-cli", delegating, DELEGATE, cli, store)
    assert {call.agent_id for call in calls} == {None}
    threads = [[span.call_id for span in t.spans] for t in trajectories if t.role == "subagent"]
    assert sorted(map(len, threads)) == [4, 4]
    assert sum(call.role == "subagent" for call in calls) == 8
    main = [call for call in calls if call.role == "main"]
    assert [call.fallback for call in main] == ["first_call", None]


@pytest.mark.parametrize("name", ["pi", "opencode"])
async def test_a_rewritten_history_is_a_fork_with_a_reason(name: str, cli: Cli, tmp_path: Path) -> None:
    calls, trajectories, report = await recorded(name, garbling, "Garble.", cli, tmp_path / "run.duckdb")
    thread = [call for call in calls if call.role == "main"]
    assert [call.fallback for call in thread] == ["first_call", None, "history_edited", None]
    paths = [[span.call_id for span in t.spans] for t in trajectories if t.role == "main"]
    first, garbled, *others = [call.call_id for call in thread]
    assert sorted(paths) == [[first, garbled], [first, *others]]  # the first answer came back as it was
    assert report.trained == sum(len(call.completion_token_ids) for call in thread)  # each once


async def test_a_compaction_is_a_thread_of_its_own(cli: Cli, tmp_path: Path) -> None:
    calls, trajectories, report = await recorded(
        "opencode", Overflowing(), "Look around.", cli, tmp_path / "run.duckdb", exit_code=1
    )  # it goes on to the end, and calls itself failed for the overflow
    roles = [call.role for call in calls]
    assert roles.count("compaction") == 1 and roles.count("auxiliary") == 1
    (failed,) = [call for call in calls if call.status != "ok"]
    assert failed.error is not None and failed.error.startswith("context_overflow")
    at = roles.index("compaction")
    before = [call for call in calls[:at] if call.role == "main" and call is not failed]
    after = [call for call in calls[at + 1 :] if call.role == "main"]
    for thread in (before, after):
        assert all(c.parent_call_id == p.call_id for p, c in pairwise(thread))
    assert after[0].continuation == "none"
    paths = [[span.call_id for span in t.spans] for t in trajectories if t.role == "main"]
    assert sorted(paths) == sorted([[c.call_id for c in before], [c.call_id for c in after]])
    assert set(report.masked) == {"auxiliary", "compaction"}
