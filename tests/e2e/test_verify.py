"""The proof on a real engine and in torch: tokens score again as they were sampled, and what is altered in a
store is found at its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest

from polar_mitm import engine
from tests.e2e.conftest import Cli

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# A conversation of three turns over Anthropic's API, with whole and streamed answers.
CHAT = """
import json, os, urllib.request

def ask(messages, stream):
    body = {"model": "claude-sonnet-4-5", "max_tokens": 24, "messages": messages, "stream": stream}
    headers = {"content-type": "application/json", "x-api-key": "k", "anthropic-version": "2023-06-01"}
    url = "https://api.anthropic.com/v1/messages"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        if not stream:
            return json.load(response)["content"]
        lines = [line for line in response if line.startswith(b"data: ")]
    events = [json.loads(line[6:]) for line in lines]
    text = "".join(e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta")
    return [{"type": "text", "text": text or "."}]

messages = []
for turn, question in enumerate(["What is the capital of France?", "And of Italy?", "Thank you."]):
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": ask(messages, stream=turn % 2 == 1)})
"""
ROUNDING = 1e-3  # nats; float32 on both sides


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture
async def store(cli: Cli, vllm: engine.EngineState, stores: Path, tmp_path: Path) -> Path:
    """One conversation, recorded once; a copy of it."""
    recorded = stores / "chat.duckdb"
    if not recorded.exists():
        run = await cli.run("-s", recorded, "-e", vllm.url, command=("python3", "-c", CHAT))
        done = await run.ended()
        assert done.code == 0, done.err
    return Path(shutil.copy(recorded, tmp_path / "chat.duckdb"))


async def verified(cli: Cli, store: Path, *options: object) -> tuple[int, Any]:
    done = await cli("verify", store, *options, "--json")
    return done.code, done.json()


def change(store: Path, statement: str) -> None:
    with duckdb.connect(store) as con:
        [(num_rows,)] = con.execute(statement).fetchall()
        assert num_rows == 1


def calls(store: Path) -> list[tuple[str, int, int]]:
    """Id, prompt tokens, sampled tokens of each call, in their order."""
    with duckdb.connect(store, read_only=True) as con:
        return con.execute("SELECT call_id, num_prompt, num_sampled FROM calls ORDER BY seq").fetchall()


def scorers(vllm: engine.EngineState) -> dict[str, tuple[object, ...]]:
    return {"engine": ("--engine", vllm.url), "torch": ("--model", vllm.model)}


@pytest.mark.parametrize("scorer", ["engine", "torch"])
async def test_drift_is_rounding(cli: Cli, vllm: engine.EngineState, store: Path, scorer: str) -> None:
    code, found = await verified(cli, store, *scorers(vllm)[scorer])
    assert code == 0, found
    [rollout] = found["rollouts"]
    assert (rollout["num_calls"], rollout["num_equal"], rollout["num_trajectories"]) == (3, 3, 1)
    assert rollout["accounted"] and rollout["sampled"] == rollout["trained"] > 3
    drift = found["drift"]
    print(drift)
    assert drift["num_tokens"] == drift["num_kl_tokens"] == rollout["trained"]
    assert 0 <= drift["kl"] < 1e-6 and drift["mean"] <= drift["max"] < ROUNDING


@pytest.mark.parametrize("scorer", ["engine", "torch"])
async def test_an_altered_logprob_is_found(
    cli: Cli, vllm: engine.EngineState, store: Path, scorer: str
) -> None:
    call_id, num_prompt, num_sampled = calls(store)[1]
    at = num_sampled // 2
    change(store, f"""
        UPDATE call_rows SET behaviour_logprobs =
            list_transform(behaviour_logprobs, lambda v, i: CASE i WHEN {at + 1} THEN v - 0.01 ELSE v END)
        WHERE call_id = '{call_id}'
    """)  # fmt: skip
    code, found = await verified(cli, store, *scorers(vllm)[scorer])
    assert code == 1
    [outlier] = [c["outlier"] for r in found["rollouts"] for c in r["calls"] if c["outlier"]]
    assert (outlier["call_id"], outlier["index"], outlier["position"]) == (call_id, at, num_prompt + at)
    assert outlier["scored"] - outlier["recorded"] == pytest.approx(0.01, abs=ROUNDING)


@pytest.mark.parametrize("column", ["completion_token_ids", "prompt_suffix"])
async def test_an_altered_id_is_found(cli: Cli, vllm: engine.EngineState, store: Path, column: str) -> None:
    """In the first call: what was sampled after it does not follow from it."""
    call_id, num_prompt, num_sampled = calls(store)[0]
    at = num_prompt // 2 if column == "prompt_suffix" else num_sampled - 2
    change(store, f"""
        UPDATE call_rows SET {column} =
            list_transform({column}, lambda v, i: CASE i WHEN {at + 1} THEN 4000 ELSE v END)
        WHERE call_id = '{call_id}'
    """)  # fmt: skip
    code, found = await verified(cli, store, "--engine", vllm.url)
    assert code == 1
    [outlier, *_] = [c["outlier"] for r in found["rollouts"] for c in r["calls"] if c["outlier"]]
    if column == "prompt_suffix":
        assert outlier["index"] == 0 and outlier["position"] == num_prompt
    else:
        assert (outlier["index"], outlier["token_id"]) == (at, 4000)


async def test_other_weights_are_not_scored(cli: Cli, vllm: engine.EngineState, store: Path) -> None:
    call_id, _, num_sampled = calls(store)[0]
    change(store, f"UPDATE call_rows SET policy_version = 'step-7' WHERE call_id = '{call_id}'")
    code, found = await verified(cli, store, "--engine", vllm.url)
    assert code == 0
    [rollout] = found["rollouts"]
    assert rollout["unscored"] == {"other_weights": num_sampled}
    assert call_id not in {c["call_id"] for c in rollout["calls"]} and len(rollout["calls"]) == 2
    code, refused = await verified(cli, store, "--model", vllm.model)
    assert code == 2 and "which does" in refused["error"] and "step-7" in refused["error"]
    model = vllm.served_model_name
    code, found = await verified(cli, store, "--model", vllm.model, "--weights", f"{model}@step-7")
    assert code == 0 and [c["call_id"] for c in found["rollouts"][0]["calls"]] == [call_id]


async def test_weights_that_nobody_has_prove_nothing(cli: Cli, vllm: engine.EngineState, store: Path) -> None:
    code, found = await verified(cli, store, "--engine", vllm.url, "--weights", "another@1")
    assert code == 1 and found["sound"] is False
    assert found["drift"]["num_tokens"] == 0
