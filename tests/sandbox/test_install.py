"""Real packages from the real registries, and the real harnesses from the cache, run in sandboxes."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from polar_mitm.cache import default_cache
from polar_mitm.errors import SetupError
from polar_mitm_sandbox import install, recipes
from tests.sandbox.conftest import PROVIDER
from tests.sandbox.users import User

SMALL = """
title = "Semver"
version = "7.6.3"
[install]
npm = "semver"
binary = "node_modules/semver/bin/semver.js"
[run]
argv = ["{prompt}"]
"""


@pytest.fixture
def small(tmp_path: Path) -> recipes.Recipe:
    (tmp_path / "semver.toml").write_text(SMALL)
    return recipes.load(str(tmp_path / "semver.toml"))


def test_install_once_then_offline(
    small: recipes.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    found: list[install.InstalledHarness] = []
    threads = [
        threading.Thread(target=lambda: found.append(install.ensure_harness(small, tmp_path, steps.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == found[:1] * 4
    assert len([step for step in steps if step.startswith("Installing")]) == 1  # the others waited
    assert found[0].bin_path.is_file()
    assert found[0].size_bytes > 10_000
    monkeypatch.setenv("PATH", "/nonexistent")
    assert install.ensure_harness(small, tmp_path) == found[0]


def test_a_half_made_installation_is_made_again(small: recipes.Recipe, tmp_path: Path) -> None:
    first = install.ensure_harness(small, tmp_path)
    shutil.rmtree(first.prefix / "node_modules")
    assert not install.is_installed(small, tmp_path)
    assert install.ensure_harness(small, tmp_path).bin_path.is_file()
    (first.prefix / ".complete").unlink()
    assert not install.is_installed(small, tmp_path)


def test_it_runs_with_the_node_of_this_machine(small: recipes.Recipe, user: User) -> None:
    with user.directory() as cache:
        harness = install.ensure_harness(small, cache)
        shown = [str(path) for path in harness.ro_paths]
        out = user.sandbox([*harness.command, "1.2.3", "0.9.0"], read_only=shown)
    assert (out.exit_code, out.stdout) == (0, "0.9.0\n1.2.3\n"), out


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("7.6.3", "99999.0.0", "No matching version"),
        ("bin/semver.js", "bin/*.cmd", "0 files match"),
    ],
)
def test_what_cannot_be_installed_is_not_taken_for_whole(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    (tmp_path / "semver.toml").write_text(SMALL.replace(old, new))
    recipe = recipes.load(str(tmp_path / "semver.toml"))
    with pytest.raises(SetupError, match=complaint):
        install.ensure_harness(recipe, tmp_path)
    assert not install.is_installed(recipe, tmp_path)


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["claude-code", "codex", "pi", "opencode", "qwen-code", "gemini-cli"])
def test_harness_runs_in_the_sandbox(name: str, certificates: tuple[str, Path]) -> None:
    """From the cache of whoever runs the tests, so not as somebody who may not read it."""
    recipe = recipes.load(name)
    harness = install.ensure_harness(recipe, default_cache())
    user = User.current(*certificates)
    shown = list(map(str, harness.ro_paths))
    out = user.sandbox([*harness.command, "--version"], read_only=shown, path=harness.path, env=recipe.env)
    assert out.exit_code == 0, out
    assert recipe.version in out.stdout


def _event(kind: str, **fields: object) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def _answer(block: dict[str, object], delta: dict[str, object], stop_reason: str) -> str:
    message = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip
    return (
        _event("message_start", message=message)
        + _event("content_block_start", index=0, content_block=block)
        + _event("content_block_delta", index=0, delta=delta)
        + _event("content_block_stop", index=0)
        + _event("message_delta", delta={"stop_reason": stop_reason}, usage={"output_tokens": 5})
        + _event("message_stop")
    )


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_sdk_agent_does_a_task(certificates: tuple[str, Path]) -> None:
    """Our own agent, its official SDK, and a provider that has one command run and then says so."""
    recipe = recipes.load("sdk-agent")
    harness = install.ensure_harness(recipe, default_cache())
    command = json.dumps({"command": "echo hi > hello.txt; cat hello.txt"})
    call = {"type": "tool_use", "id": "toolu_1", "name": "bash", "input": {}}
    replies = [
        _answer(call, {"type": "input_json_delta", "partial_json": command}, "tool_use"),
        _answer({"type": "text", "text": ""}, {"type": "text_delta", "text": "Made it."}, "end_turn"),
    ]
    user = User.current(*certificates)
    with user.directory() as workdir:
        out = user.sandbox(
            [*harness.command, *recipe.arguments("Write hi to hello.txt", "m")],
            workdir=workdir,
            read_only=list(map(str, harness.ro_paths)),
            env=recipe.env,
            certificate=str(user.certificate),
            replies=replies,
        )
        assert out.exit_code == 0, out
        assert (workdir / "hello.txt").read_text() == "hi\n"
    assert "Made it." in out.stdout
    assert out.posts is not None
    first, second = map(json.loads, out.posts)
    assert (first["model"], first["stream"]) == ("m", True)
    result = second["messages"][-1]["content"][0]
    assert (result["tool_use_id"], result["content"]) == ("toolu_1", "hi\n\n[exit code 0]")
    assert PROVIDER in recipe.hosts
