"""The real Codex over WebSocket: several turns on one connection, compaction, and the way back to HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pytest

from polar_mitm.conformance.scripts import Answer, shell_call
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from tests.e2e.conftest import Cli, sampled
from tests.e2e.engines import LAST_WORDS, HarnessEngine, is_probe
from tests.e2e.sessions import num_answered
from tests.support.record_fixtures import HARNESSES

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def looking_twice(request: dict[str, Any], nth: int) -> Answer:
    """Two tool calls, then the last words."""
    call = shell_call(request, "echo seen")
    if is_probe(request) or call is None or num_answered(request) >= 2:
        return Answer(text=LAST_WORDS)
    return Answer(text=f"Look {num_answered(request)}.", reasoning="Hm.", tool_calls=(call,))


@pytest.mark.parametrize("name", ["codex", "codex-lite"])
async def test_three_turns_on_one_connection(name: str, cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "run.duckdb"
    async with HarnessEngine(looking_twice) as engine:
        run = await cli.run("--store", store, "--engine", engine.url, command=HARNESSES[name])
        done = await run.ended()
    assert done.code == 0 and LAST_WORDS.splitlines()[0] in done.out, done.err
    with open_reader(store) as reader:
        every = reader.calls(wire=True)
        (rollout,) = reader.rollouts()
        events = reader.egress()
    calls = sampled(every)
    assert len(every) == len(calls) + 1 and every[0] not in calls  # one connection was warmed up
    assert {call.route for call in every} == {"WS /v1/responses"}
    assert len({dict(call.wire.request_headers)["Sec-WebSocket-Key"] for call in every}) == 1
    assert not [event for event in events if event.layer == "websocket"]

    # Each message says only what is new, refers to what was said, and is continued in the sampled ids.
    bodies = [json.loads(call.wire.request_body) for call in calls]
    answered = [json.loads(call.wire.response_body.splitlines()[-1])["response"]["id"] for call in every]
    assert [body["previous_response_id"] for body in bodies] == answered[:-1]
    assert len(bodies[1]["input"]) == len(bodies[2]["input"]) == 1
    assert [call.continuation for call in calls] == ["none", "exact", "exact"]
    trajectories, report = build(every, rollout=rollout)
    assert len(trajectories) == 1 and report.trained == sum(len(c.completion_token_ids) for c in engine.asked)
    assert report.adds_up

    # And all of it is in the store.
    with duckdb.connect(str(store), read_only=True) as db:
        tables = {table for (table,) in db.sql("select table_name from duckdb_tables()").fetchall()}
        num_rows, num_tokens = db.sql("select count(*), sum(num_sampled) from calls").fetchall()[0]
    assert tables and (num_rows, num_tokens) == (len(every), report.sampled)


async def test_an_option_answers_426_instead(cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "run.duckdb"
    cli.env["POLAR_MITM_WEBSOCKET"] = "false"
    async with HarnessEngine() as engine:
        run = await cli.run("--store", store, "--engine", engine.url, command=HARNESSES["codex"])
        done = await run.ended()
    assert done.code == 0, done.err
    with open_reader(store) as reader:
        assert {call.route for call in reader.calls()} == {"POST /v1/responses"}
        (turned_down,) = [event for event in reader.egress() if event.layer == "websocket"]
    assert (turned_down.verdict, turned_down.detail) == ("stubbed", "426: use HTTP")


@pytest.mark.parametrize("websocket", ["true", "false"])
async def test_compaction(websocket: str, cli: Cli, tmp_path: Path) -> None:
    """Told to compact early, Codex asks for a summary, and goes on from it, though the model did not heed."""
    store = tmp_path / "run.duckdb"
    cli.env["POLAR_MITM_WEBSOCKET"] = websocket

    def script(request: dict[str, Any], nth: int) -> Answer:
        answer = looking_twice(request, nth)
        if "Summarise the conversation" in json.dumps(request["messages"][-1]):
            return Answer(reasoning="It looked twice.", tool_calls=(("exec_command", '{"cmd":"true"}'),))
        summed_up = "Summary of the conversation" in json.dumps(request["messages"])
        return Answer(text=LAST_WORDS) if summed_up and not is_probe(request) else answer

    *command, prompt = HARNESSES["codex"]
    command += ["-c", "model_auto_compact_token_limit=1000", prompt]
    async with HarnessEngine(script) as engine:
        run = await cli.run("--store", store, "--engine", engine.url, command=command)
        done = await run.ended()
    assert done.code == 0, done.err
    with open_reader(store) as reader:
        calls = sampled(reader.calls(wire=True))
    compactions = [call for call in calls if call.role == "compaction"]
    assert compactions and all(call.status == "ok" for call in compactions)
    assert any(call.fallback == "compacted" for call in calls)
