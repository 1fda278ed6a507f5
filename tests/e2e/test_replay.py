"""The real programs once more, on what they were answered: offline to the end, or live from a call on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.conformance.scripts import Answer, Script
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from polar_mitm.types import ModelCall
from tests.e2e.conftest import Cli, sampled
from tests.e2e.engines import LAST_WORDS, HarnessEngine, is_probe, writing
from tests.support.record_fixtures import HARNESSES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def breaking_once() -> Script:
    """As `writing`, but the first answer breaks off after a few tokens."""
    broken: list[Answer] = []

    def script(request: dict[str, Any], nth: int) -> Answer:
        answer = writing(request, nth)
        if broken or is_probe(request):
            return answer
        broken.append(dataclasses.replace(answer, error_after_tokens=4, chunk_delay_s=0.1))
        return broken[0]

    return script


async def record(cli: Cli, name: str, store: Path, script: Script = writing) -> list[ModelCall]:
    """A rollout of a real harness; its engine is gone when this returns."""
    async with HarnessEngine(script) as engine:
        run = await cli.run("--store", store, "--engine", engine.url, command=HARNESSES[name])
        done = await run.ended()
    assert done.code == 0, done.err
    with open_reader(store) as reader:
        return reader.calls(wire=True)


def main_thread(calls: list[ModelCall]) -> list[ModelCall]:
    """Without titles, and Gemini CLI's router."""
    return [call for call in sampled(calls) if call.role == "main"]


@pytest.mark.parametrize("name", HARNESSES)
async def test_offline_to_the_end(name: str, cli: Cli, tmp_path: Path) -> None:
    store, again, task = tmp_path / "run.duckdb", tmp_path / "again.duckdb", tmp_path / "task"
    task.mkdir()
    recorded = await record(cli, name, store)
    options = ["--store", store, "--fast", "--json", "--out", again, "--task-dir", task]
    done = await cli("replay", recorded[0].rollout_id, *options)
    told = done.json()
    assert done.code == 0 and told["faithful"], [step["divergences"] for step in told["steps"]]
    assert told["unreached"] == [] and told["num_served"] == len(recorded) == len(told["steps"])

    # The harness did what it had done: it wrote the file, and said the last words.
    assert (task / "hello.txt").read_text() == "hi" and LAST_WORDS in done.err
    with open_reader(again) as reader:
        fresh, (rollout,) = reader.calls(wire=True), reader.rollouts()
    assert (rollout.status, rollout.incomplete) == ("completed", None)
    served = {call.replayed_from: call for call in fresh}
    for call in recorded:
        assert served[call.call_id].wire.response_body == call.wire.response_body
        assert served[call.call_id].wire.response_headers == call.wire.response_headers
        assert served[call.call_id].completion_token_ids == call.completion_token_ids


@pytest.mark.parametrize("name", ["claude-code", "codex", "gemini-cli", "qwen-code"])  # at their own pace
async def test_faults_come_again_at_the_recorded_pace(name: str, cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "run.duckdb"
    recorded = await record(cli, name, store, breaking_once())
    assert {call.status for call in recorded} == {"ok", "failed"}
    done = await cli("replay", recorded[0].rollout_id, "--store", store, "--json")
    told = done.json()
    assert done.code == 0 and told["faithful"], told["steps"]
    assert sorted(step["recorded"] for step in told["steps"]) == sorted(call.call_id for call in recorded)


@pytest.mark.parametrize("name", HARNESSES)
async def test_another_prompt_differs_where_it_is_said(name: str, cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "run.duckdb"
    recorded = await record(cli, name, store)
    *command, prompt = HARNESSES[name]
    options = ["--store", store, "--fast", "--json"]
    done = await cli("replay", recorded[0].rollout_id, *options, "--", *command, prompt + " Hurry.")
    assert done.code == 1
    diverged = [step for step in done.json()["steps"] if step["outcome"] == "diverged"]
    if name.startswith("codex"):  # it says only what is new, and nothing to warm up
        assert [step["outcome"] for step in done.json()["steps"]] == ["same", "diverged", "same"]
    else:
        assert len(diverged) == len(recorded)
    for step in diverged:
        assert step["num_divergences"] == 1
        (first,) = step["divergences"]
        assert first["field"].startswith(("body.messages[", "body.input[", "body.contents["))
        assert first["live"].endswith((" Hurry.", ' Hurry."'))  # opencode quotes it


@pytest.mark.parametrize("name", HARNESSES)
async def test_a_fork_goes_on_from_the_recorded_tokens(name: str, cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "run.duckdb"
    recorded = await record(cli, name, store)
    first, second = main_thread(recorded)
    async with HarnessEngine(lambda request, nth: Answer(text="Live words.")) as engine:
        options = ["--store", store, "--fast", "--json", "--fork-at", second.call_id, "--engine", engine.url]
        done = await cli("replay", first.rollout_id, *options)
        told = done.json()
        assert done.code == 0, (told, done.err)
        (asked,) = engine.asked
    assert "Live words." in done.err and LAST_WORDS not in done.err
    with open_reader(store) as reader:
        (fork,) = [r for r in reader.rollouts() if r.forked_from]
        replayed, live = main_thread(reader.calls(fork.rollout_id))
    assert fork.forked_from == f"{first.rollout_id}/{second.call_id}"
    assert (replayed.replayed_from, live.replayed_from) == (first.call_id, None)
    assert (live.parent_call_id, live.continuation) == (replayed.call_id, "exact")
    prefix = [*first.prompt_token_ids, *first.completion_token_ids]
    assert asked.prompt_token_ids[: len(prefix)] == prefix
    assert asked.prompt_token_ids == list(live.prompt_token_ids)
    trajectories, report = build([replayed, live], rollout=fork)
    assert len(trajectories) == 1 and report.trained == len(live.completion_token_ids)
    assert report.masked == {"replayed": len(first.completion_token_ids)}
