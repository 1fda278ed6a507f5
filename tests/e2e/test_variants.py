"""Every variant of every recipe does a task: other logins, other providers, other models, other dialects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polar_mitm.cache import default_cache
from polar_mitm.reconstruct import build
from polar_mitm.store import open_reader
from polar_mitm_sandbox import recipes
from polar_mitm_sandbox.install import ensure_harness
from tests.e2e.conftest import Cli, sampled
from tests.e2e.engines import HarnessEngine
from tests.support.record_fixtures import PROMPT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
CHATGPT = "/backend-api/codex/responses"
CHAT = "/chat/completions"
GEMINI = ":streamGenerateContent"
WHERE = {
    "claude-code:login": ("claude-sonnet-5-5", "/v1/messages"),
    "codex:lite": ("gpt-6.1-sol", "/v1/responses"),
    "codex:gpt-5.5": ("gpt-5.5", "/v1/responses"),
    "codex:unknown": ("local-model", "/v1/responses"),
    "codex:login": ("gpt-5", CHATGPT),
    "codex:login:lite": ("gpt-6.1-sol", CHATGPT),
    "opencode:openai": ("gpt-", "/v1/responses"),
    "opencode:google": ("gemini-", GEMINI),
    "opencode:openrouter": ("google/gemini-", CHAT),
    "pi:openai": ("gpt-", "/v1/responses"),
    "pi:google": ("gemini-", GEMINI),
    "pi:openrouter": ("", CHAT),
}
"""How the model's name begins, and how the path of its calls ends."""


def test_every_variant_is_here() -> None:
    single = {name for name in WHERE if name.count(":") == 1}
    assert single == {f"{name}:{each}" for name in recipes.available() for each in recipes.variants(name)}


@pytest.mark.parametrize("name", WHERE)
async def test_variant_writes_a_file(name: str, cli: Cli, tmp_path: Path) -> None:
    task, store = tmp_path / "task", tmp_path / "run.duckdb"
    task.mkdir()
    options = ["--store", store, "--task-dir", task, "--harness", name, "--prompt", PROMPT]
    async with HarnessEngine() as engine:
        done = await (await cli.start("run", "--engine", engine.url, *options)).ended()
    assert done.code == 0, done.err
    assert (task / "hello.txt").read_text() == "hi"
    with open_reader(store) as reader:
        calls = sampled(reader.calls(wire=True))
        (rollout,) = reader.rollouts()
    assert (rollout.harness, rollout.status, rollout.incomplete) == (name, "completed", None)
    assert all(call.status == "ok" and call.delivered for call in calls)
    thread = [call for call in calls if call.role == "main"]
    assert len(thread) == 2
    # The reasoning came back too: opencode and pi give OpenRouter's only as the details that they were given.
    assert [call.continuation for call in thread] == ["none", "exact"]
    model, path = WHERE[name]
    assert all(call.model_requested.startswith(model) for call in thread)
    assert all(call.wire.path.partition("?")[0].endswith(path) for call in thread)
    _, report = build(calls, rollout=rollout)
    assert report.adds_up and report.trained == sum(len(call.completion_token_ids) for call in thread)


MINE = """
title = "Mine"
[hosts]
"models.mine.example" = "openai"
[run]
program = "{program}"
argv = ["{file}", "{{prompt}}"]
[env]
MINE_KEY = "sandbox"
[variant.other]
hosts = {{ "models.other.example" = "google" }}
"""
AGENT = """
import json, os, pathlib, ssl, sys, urllib.request as u
assert os.environ["MINE_KEY"] == "sandbox"
host = pathlib.Path(__file__).with_name("host").read_text()
chat = host.startswith("models.mine")
path = "/v1/chat/completions" if chat else "/v1beta/models/m:generateContent"
asked = {"messages": [{"role": "user", "content": sys.argv[1]}], "model": "m"} if chat else {
    "contents": [{"role": "user", "parts": [{"text": sys.argv[1]}]}]}
headers = {"content-type": "application/json"}
request = u.Request(f"https://{host}{path}", json.dumps(asked).encode(), headers)
print(u.urlopen(request, timeout=60).read().decode())
"""


@pytest.mark.parametrize(
    ("variant", "host", "dialect"),
    [("", "models.mine.example", "openai_chat"), (":other", "models.other.example", "gemini")],
)
async def test_a_user_adds_one_without_touching_code(
    variant: str, host: str, dialect: str, cli: Cli, tmp_path: Path
) -> None:
    """A program, two hosts of its own in two dialects, one file."""
    python = ensure_harness(recipes.load("sdk-agent"), default_cache()).bin_path
    agent, store = tmp_path / "agent", tmp_path / "run.duckdb"
    agent.mkdir()
    (agent / "main.py").write_text(AGENT)
    (agent / "host").write_text(host)
    (tmp_path / "mine.toml").write_text(MINE.format(program=python, file=agent / "main.py"))
    given = ["--harness", f"{tmp_path / 'mine.toml'}{variant}", "--prompt", "--hello", "--read-only", agent]
    async with HarnessEngine() as engine:
        done = await (await cli.start("run", "--store", store, "--engine", engine.url, *given)).ended()
    assert done.code == 0, done.err
    assert "A small task" in json.dumps(json.loads(done.out))
    with open_reader(store) as reader:
        (call,) = reader.calls()
        (rollout,) = reader.rollouts()
    assert (rollout.harness, call.dialect, call.status) == (f"mine{variant}", dialect, "ok")
