"""`polar-mitm demo` with a real vLLM: the whole of it, as a user runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from polar_mitm import engine
from polar_mitm.store import open_reader
from tests.e2e.conftest import Cli, sampled

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", [(), ("pi", "opencode")])
async def test_demo_with_a_real_engine(
    names: Sequence[str], cli: Cli, vllm: engine.EngineState, tmp_path: Path
) -> None:
    store = tmp_path / "demo.duckdb"
    options = [part for name in names for part in ("--harness", name)]
    demo = await cli.start("demo", "--json", "--store", store, "--engine", vllm.url, *options)
    done = await demo.ended(1500)
    assert done.code == 0, done.err
    told = done.json()

    assert told["engine"]["model"] == vllm.served_model_name
    assert [h["name"] for h in told["harnesses"]] == list(names or ("claude-code", "codex"))
    for harness in told["harnesses"]:
        assert harness["version"] and harness["exit_code"] == 0
        assert harness["calls"] >= 1 and harness["sampled_tokens"] >= 1 and harness["incomplete"] is None
    account = told["accounting"]
    assert account["sampled"] == account["trained"] + account["masked"] + account["quarantined"] > 0
    assert account["sampled"] == sum(h["sampled_tokens"] for h in told["harnesses"])
    assert Path(told["store"]) == store

    with open_reader(store) as reader:
        calls = reader.calls()
    answered = [c for c in sampled(calls) if c.status == "ok"]
    assert answered
    for call in answered:
        assert len(call.completion_token_ids) == len(call.behaviour_logprobs) == call.usage.completion_tokens
        assert len(call.prompt_token_ids) == call.usage.prompt_tokens
        assert all(logprob <= 0 for logprob in call.behaviour_logprobs)
        assert call.policy_version and call.sampling.temperature == 1.0
