"""The real Claude Code and the real Codex, in real sandboxes, made to write a file by a scripted engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from tests.e2e.conftest import Cli, last_json
from tests.support.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.e2e
PROMPT = "Create hello.txt containing hi with the shell tool, then say done."

COMMANDS = {
    "claude-code": ["claude", "--dangerously-skip-permissions", "-p", PROMPT],
    "codex": [
        "codex", "exec", "--model", "gpt-5", "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check",
        PROMPT,
    ],
    # No model named: Codex then offers one JavaScript tool with a grammar, in a namespace.
    "codex-lite": [
        "codex", "exec", "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check", PROMPT
    ],
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", COMMANDS)
async def test_harness_writes_a_file(
    name: str, cli: Cli, writing_engine: ScriptedEngine, tmp_path: Path
) -> None:
    task, store = tmp_path / "task", tmp_path / "run.duckdb"
    task.mkdir()
    command = ["run", "--store", store, "--engine", writing_engine.url, "--task-dir", task, "--json"]
    done = await asyncio.to_thread(cli, *command, "--", *COMMANDS[name])

    assert done.returncode == 0, done.stderr
    assert (task / "hello.txt").read_text() == "hi"
    told = last_json(done.stdout)
    assert told["exit_code"] == 0 and told["incomplete"] is None
    with open_reader(store) as reader:
        calls = reader.calls()
        (rollout,) = reader.rollouts()
        events = reader.egress()
    assert rollout.status == "completed" and rollout.incomplete is None
    assert rollout.harness_version == told["version"] != ""

    # Every token that the engine sampled for the harness is in the store, as sampled, under its own prompt.
    asked = [c for c in writing_engine.calls if "get_weather" not in str(c.request.get("tools"))]
    asked = [c for c in asked if c.outcome == "finished" and c.request.get("stream")]
    assert [c.completion_token_ids for c in calls] == [c.completion_token_ids for c in asked]
    assert [c.prompt_token_ids for c in calls] == [c.prompt_token_ids for c in asked]
    assert all(len(c.behaviour_logprobs) == len(c.completion_token_ids) for c in calls)
    assert told["calls"] == len(calls) >= 2
    assert told["sampled_tokens"] == sum(len(c.completion_token_ids) for c in calls)

    # The provider's model name was asked for and echoed; ours was served.
    assert {c.model_served for c in calls} == {"scripted"}
    assert all(c.model_requested.startswith(("claude-", "gpt-")) for c in calls)

    trajectories, report = build(calls, rollout=rollout)
    assert report.adds_up and report.sampled == told["sampled_tokens"]
    assert len(trajectories) == 1 and report.trained == report.sampled  # two turns, one thread

    # Nothing but the provider was reachable, and each refusal carries a name.
    assert all(e.name for e in events)
    assert set(told["refused"]) == {e.name for e in events if e.verdict == "refused"}


@pytest.mark.timeout(300)
async def test_any_command_has_no_way_out(cli: Cli, writing_engine: ScriptedEngine, tmp_path: Path) -> None:
    """No packet leaves: one interface, no route but to itself, every other name refused and recorded."""
    store = tmp_path / "run.duckdb"
    script = (
        "import socket, urllib.request as u\n"
        "print(sorted(n for _, n in socket.if_nameindex()))\n"
        "for host in ('example.com', 'metadata.google.internal'):\n"
        "    try: socket.getaddrinfo(host, 443); print('resolved')\n"
        "    except OSError: print('no', host)\n"
        "for url in ('https://1.1.1.1/', 'http://169.254.169.254/latest/meta-data'):\n"
        "    try: print(u.urlopen(url, timeout=10).status)\n"
        "    except Exception as e: print('refused', url)\n"
    )
    command = ["run", "--store", store, "--engine", writing_engine.url, "--", "python3", "-c", script]
    done = await asyncio.to_thread(cli, *command)
    assert done.stdout.splitlines() == [
        "['lo']",
        "no example.com",
        "no metadata.google.internal",
        "refused https://1.1.1.1/",
        "refused http://169.254.169.254/latest/meta-data",
    ], done.stderr
    with open_reader(store) as reader:
        refused = {(e.layer, e.name) for e in reader.egress() if e.verdict == "refused"}
    names = {name for _, name in refused}
    assert {"example.com", "metadata.google.internal", "169.254.169.254"} <= names
    assert any(name.startswith("1.1.1.1") for name in names)
