"""The providers' own SDKs as programs in the sandbox, on a real model: they parse what was sampled."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from polar_mitm import engine
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from tests.e2e import clients
from tests.e2e.conftest import Cli

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SEVERAL = {"gemini", "openai_chat"}
"""Whose API gives several answers to one call."""
SHOWN = SEVERAL | {"openai_responses"}
"""Whose API shows logprobs."""


@pytest.mark.parametrize("name", sorted(clients.CLIENTS))
async def test_a_program_with_the_providers_sdk(
    name: str, cli: Cli, vllm: engine.EngineState, tmp_path: Path
) -> None:
    store = tmp_path / "run.duckdb"
    (task := tmp_path / "task").mkdir()
    shutil.copy(clients.__file__, task / "clients.py")
    command = [sys.executable, "clients.py", name]
    run = await cli.run("--store", store, "--engine", vllm.url, command=command, task=task)
    done = await run.ended()
    assert done.code == 0, done.err
    told = json.loads(done.out.splitlines()[-1])
    with open_reader(store) as reader:
        calls, (rollout,) = reader.calls(), reader.rollouts()
    assert {call.dialect for call in calls} == {name} and {call.status for call in calls} == {"ok"}
    assert all(len(c.completion_token_ids) == len(c.behaviour_logprobs) > 0 for c in calls)

    # What the SDK put together is what was streamed; the second call goes on from the first one's ids.
    first, second = calls[:2]
    assert told["deltas"] == told["streamed"] and second.stream and not first.stream
    so_far = [*first.prompt_token_ids, *first.completion_token_ids]
    assert second.prompt_token_ids[: len(so_far)] == so_far and second.parent_call_id == first.call_id

    several = calls[2:-2]
    assert len(several) == (3 if name in SEVERAL else 1 if name in SHOWN else 0)
    assert told.get("answers", len(several)) == len(several)
    if name in SHOWN:
        assert len({tuple(c.prompt_token_ids) for c in several}) == 1
        for call, logprobs, top in zip(several, told["logprobs"], told["top"], strict=True):
            # The last token may be the end of the turn, which no API shows.
            assert len(call.behaviour_logprobs) - len(logprobs) in (0, 1)
            assert logprobs == pytest.approx(call.behaviour_logprobs[: len(logprobs)], abs=1e-6)
            assert set(top) == {2}

    # A grammar gives what was asked for even of a small model, and such tokens do not train.
    assert told["parsed"] in ("Paris", "Rome") and told["tool"]["name"] in ("Paris", "Rome")
    by_schema, by_tool = calls[-2:]
    assert "guided:json_schema" in by_schema.notes and "guided:tool_choice" in by_tool.notes
    _, report = build(calls, rollout=rollout)
    assert report.adds_up and 0 < report.trained <= sum(len(c.completion_token_ids) for c in calls[:-2])

    verified = await cli("verify", store, "--engine", vllm.url, "--json")
    assert verified.code == 0, verified.out
    assert verified.json()["drift"]["max"] < 1e-3
