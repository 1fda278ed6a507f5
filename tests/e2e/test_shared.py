"""One interceptor, many sandboxes: runners in other processes, a reader in a third, and a crowd."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.cli.hosting import ControlHost
from polar_mitm.cli.rollout import Job, Outcome, run_rollout
from polar_mitm.conformance.scripts import Answer
from polar_mitm.dialects.responses_socket import PREWARM
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from tests.e2e.conftest import Cli, Started, sampled, until
from tests.e2e.engines import LAST_WORDS, HarnessEngine, told_by_tool
from tests.support.record_fixtures import HARNESSES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
NUM_SANDBOXES = 64
MAX_RSS_BYTES = 1 << 30


class SecondTurn(HarnessEngine):
    """Holds what comes after a tool has answered."""

    def holds(self, request: dict[str, Any]) -> bool:
        return told_by_tool(request)


async def up(cli: Cli, store: Path, control: Path, engine: HarnessEngine) -> Started:
    """`polar-mitm up`, once it serves."""
    started = await cli.start("up", "--store", store, "--engine", engine.url, "--control", control, "--json")
    assert json.loads(await started.line())["control"] == str(control)
    return started


async def test_two_runners_and_a_reader(cli: Cli, tmp_path: Path) -> None:
    store, control = tmp_path / "shared.duckdb", tmp_path / "control.sock"
    async with SecondTurn() as engine:
        engine.gate.clear()
        interceptor = await up(cli, store, control, engine)
        runs = [
            await cli.run("--control", control, "--group", "g", command=HARNESSES[name])
            for name in ("claude-code", "codex")
        ]
        await until(lambda: engine.num_waiting == 2, "both harnesses in their second turn", *runs)

        during = (await cli("calls", "--store", store, "--json")).json()
        assert [r["status"] for r in during["rollouts"]] == ["running", "running"]
        asked = [call for call in during["calls"] if PREWARM not in call["notes"]]
        seen = {call["rollout_id"]: call for call in asked}
        assert len(seen) == len(asked) == 2  # the first call of each, while both wait
        assert all(call["status"] == "ok" and call["num_sampled_tokens"] > 0 for call in seen.values())

        engine.gate.set()
        for done in await asyncio.gather(*(run.ended() for run in runs)):
            assert (done.code, done.out.rstrip("\n")) == (0, LAST_WORDS), done.err
        interceptor.interrupt()
        assert (await interceptor.ended()).code == 0

    with open_reader(store) as reader:
        rollouts = {r.harness: r for r in reader.rollouts()}
        calls = {name: sampled(reader.calls(rollouts[name].rollout_id)) for name in rollouts}
    assert set(calls) == {"claude-code", "codex"}
    for name, dialect in (("claude-code", "anthropic"), ("codex", "openai_responses")):
        rollout = rollouts[name]
        assert (rollout.status, rollout.incomplete, rollout.group_id) == ("completed", None, "g")
        assert {(call.dialect, call.status) for call in calls[name]} == {(dialect, "ok")}
        assert [call.seq for call in calls[name]] == ([1, 2] if name == "codex" else [0, 1])
        trajectories, report = build(calls[name], rollout=rollout)
        assert len(trajectories) == 1 and report.trained == report.sampled > 0
    given = [call.completion_token_ids for call in engine.asked]
    kept = [call.completion_token_ids for found in calls.values() for call in found]
    assert sorted(kept) == sorted(given)
    assert not control.exists()
    assert [left for run in runs for left in run.leftovers()] == []


AGENT = """
import json, sys, urllib.request as u
ask = {"model": "m", "max_tokens": 100, "stream": True, "messages": [
    {"role": "user", "content": sys.argv[1] + " " + "padding " * 6000}]}
request = u.Request("https://api.anthropic.com/v1/messages", json.dumps(ask).encode(), {"x-api-key": "none"})
data = [json.loads(line[5:]) for line in u.urlopen(request) if line.startswith(b"data:")]
assert data[-1] == {"type": "message_stop"}, data
text = "".join(event["delta"]["text"] for event in data if event["type"] == "content_block_delta")
sys.exit(0 if text == "answer to " + sys.argv[1] else f"got {text!r}")
"""
"""A harness of one call, with a prompt of 48 kB, that checks that the answer is its own."""


def echoing(request: dict[str, Any], nth: int) -> Answer:
    return Answer(text="answer to " + request["messages"][-1]["content"].split()[0])


async def test_a_crowd_with_one_call_each_in_flight(cli: Cli, tmp_path: Path) -> None:
    store, control = tmp_path / "crowd.duckdb", tmp_path / "control.sock"

    async def one(number: int) -> Outcome:
        workdir = tmp_path / f"task{number}"
        workdir.mkdir()
        job = Job([sys.executable, "-c", AGENT, f"name-{number}"], workdir, name="agent", task_id=f"{number}")
        return await run_rollout(job, ControlHost(control))

    async with HarnessEngine(echoing) as engine:
        interceptor = await up(cli, store, control, engine)
        engine.gate.clear()
        crowd = [asyncio.create_task(one(number)) for number in range(NUM_SANDBOXES)]
        await until(lambda: engine.num_waiting == NUM_SANDBOXES, "every sandbox's call at the engine")
        held_bytes = rss_bytes(interceptor.process.pid)
        engine.gate.set()
        outcomes = await asyncio.gather(*crowd)
        peak_bytes = rss_bytes(interceptor.process.pid, "VmHWM")
        interceptor.interrupt()
        assert (await interceptor.ended()).code == 0
    print(f"{NUM_SANDBOXES} calls in flight: {held_bytes / 1e6:.0f} MB, at most {peak_bytes / 1e6:.0f} MB")
    assert peak_bytes < MAX_RSS_BYTES

    assert {(o.exit_code, o.calls, o.incomplete) for o in outcomes} == {(0, 1, None)}
    with open_reader(store) as reader:
        rollouts = {r.rollout_id: r for r in reader.rollouts()}
        calls = reader.calls(wire=True)
    assert len(rollouts) == len(calls) == NUM_SANDBOXES
    for call in calls:
        rollout = rollouts.pop(call.rollout_id)  # each has one
        assert (rollout.status, rollout.incomplete, call.status) == ("completed", None, "ok")
        said = json.loads(call.wire.request_body)["messages"][0]["content"].split()[0]
        assert said == f"name-{rollout.task_id}"
    given = {tuple(c.prompt_token_ids): c.completion_token_ids for c in engine.asked}
    assert {tuple(c.prompt_token_ids): c.completion_token_ids for c in calls} == given
    assert len(given) == NUM_SANDBOXES


def rss_bytes(pid: int, what: str = "VmRSS") -> int:
    """Resident memory of a process, now or (VmHWM) at its most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024
