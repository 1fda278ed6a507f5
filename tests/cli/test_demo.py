"""`polar-mitm demo` where something cannot be had: it says so, and shows what can be shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from polar_mitm.cache import default_cache
from polar_mitm.store import open_reader
from tests.cli.conftest import finish, launch, scripted_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
NO_NPM = {"npm_config_registry": "http://127.0.0.1:9", "npm_config_fetch_retries": "0"}
NO_PIP = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/nonexistent"}


def test_both_harnesses(tmp_path: Path, engine_url: str) -> None:
    store = tmp_path / "demo.duckdb"
    with launch("demo", "--engine", engine_url, "--store", store) as process:
        told = finish(process, 600)
    assert told.code == 0, told.err
    for text in ("claude-code", "codex", "solved", "every sampled token is accounted for", str(store)):
        assert text in told.out
    assert "nobody solved" not in told.out
    with open_reader(store) as reader:
        assert [(r.harness, r.exit_code) for r in reader.rollouts()] == [("claude-code", 0), ("codex", 0)]
        refused = {e.name for e in reader.egress() if e.verdict == "refused"}
    assert refused and all(name in told.out for name in refused)


def test_without_harnesses_our_own_agent_is_intercepted(tmp_path: Path, engine_url: str) -> None:
    store = tmp_path / "demo.duckdb"
    environment = {**os.environ, **NO_NPM, "POLAR_MITM_CACHE": str(tmp_path / "cache")}
    with launch("demo", "--json", "--engine", engine_url, "--store", store, env=environment) as process:
        told = finish(process, 600)
    assert told.code == 0, told.err
    assert "claude-code cannot be installed here" in told.err and "codex cannot be installed" in told.err
    document = json.loads(told.out)
    assert set(document["unavailable"]) == {"claude-code", "codex"}
    (agent,) = document["harnesses"]
    assert (agent["name"], agent["exit_code"], agent["calls"], agent["solved"]) == ("sdk-agent", 0, 2, True)
    assert agent["version"] and agent["incomplete"] is None and agent["refused"] == []
    sampled = agent["sampled_tokens"]
    assert document["accounting"] == {"sampled": sampled, "trained": sampled, "masked": 0, "quarantined": 0}
    assert document["engine"]["model"] == "scripted" and document["store"] == str(store)


def test_without_an_engine_it_says_what_to_do(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "harness").symlink_to(default_cache() / "harness")
    environment = {**os.environ, **NO_PIP, "POLAR_MITM_CACHE": str(cache)}
    with launch("demo", "--json", env=environment) as process:
        told = finish(process, 600)
    assert told.code == 4
    assert "--engine URL takes a vLLM that runs elsewhere" in told.err
    document = json.loads(told.out)
    assert document["kind"] == "setup" and "failed" in document["error"]


def test_with_nothing_at_all_it_says_so(tmp_path: Path, engine_url: str) -> None:
    environment = {**os.environ, **NO_NPM, **NO_PIP, "POLAR_MITM_CACHE": str(tmp_path / "cache")}
    with launch("demo", "--json", "--engine", engine_url, env=environment) as process:
        told = finish(process, 600)
    assert told.code == 4
    assert "neither the harnesses nor our own agent can be installed" in json.loads(told.out)["error"]


def test_a_harness_without_an_answer_is_no_success(tmp_path: Path) -> None:
    """An engine that vanishes after the probe: the harness is told, and so is whoever runs the demo."""
    store = tmp_path / "demo.duckdb"
    options = ["--json", "--store", store, "--timeout", 8]
    with scripted_engine() as (engine, url), launch("demo", "--engine", url, *options) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("4."):
            pass
        engine.kill()
        told = finish(process, 600)
    assert told.code == 1
    assert json.loads(told.out)["accounting"]["trained"] == 0
