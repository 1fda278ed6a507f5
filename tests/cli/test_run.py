"""`polar-mitm run` with real sandboxes: exit codes, what it tells, and how it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from polar_mitm.store import open_reader
from tests.cli.conftest import POLAR_MITM, Polar, finish, launch

ASK = """
import json, ssl, urllib.request as u
body = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "go"}]}
request = u.Request("https://api.anthropic.com/v1/messages", json.dumps(body).encode(),
                    {"content-type": "application/json", "x-api-key": "k"})
print(json.load(u.urlopen(request))["content"][0]["text"])
"""


@pytest.fixture
def run(tmp_path: Path, engine_url: str) -> list[str]:
    return ["run", "--store", str(tmp_path / "new.duckdb"), "--engine", engine_url]


@pytest.mark.parametrize("url", ["{}", "{}/", "{}/v1", "{}/v1/chat/completions", "  {}"])
def test_engine_urls_as_people_write_them(url: str, polar: Polar, engine_url: str) -> None:
    for given in (url.format(engine_url), url.format(engine_url.removeprefix("http://"))):
        told = polar("engine", "probe", "--engine", given, "--json")
        assert (told.code, told.json["url"], told.json["model"]) == (0, engine_url, "scripted")


@pytest.mark.parametrize("code", [0, 1, 2, 7, 125])
def test_the_exit_code_is_the_commands(code: int, polar: Polar, run: list[str]) -> None:
    told = polar(*run, "--", "sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert (told.code, told.out) == (code, "out\n")
    assert "err\n" in told.err and f"exit {code}" in told.err


def test_what_a_machine_is_told(polar: Polar, run: list[str], tmp_path: Path) -> None:
    options = [
        "--json",
        "--group",
        "g1",
        "--task",
        "t1",
        "--task-dir",
        str(tmp_path / "task"),
        "--env",
        "A=b=c",
    ]
    (tmp_path / "task").mkdir()
    told = polar(*run, *options, "--", sys.executable, "-c", f"{ASK}\nimport os; print(os.environ['A'])")
    assert told.code == 0
    assert told.json["calls"] == 1 and told.json["sampled_tokens"] > 0 and told.json["seconds"] > 0
    assert told.json["refused"] == [] and told.json["incomplete"] is None
    assert told.json["workspace"] == str(tmp_path / "task")
    assert "Done.\n" in told.err and "b=c\n" in told.err  # stdout is the document's
    with open_reader(Path(told.json["store"])) as reader:
        (rollout,) = reader.rollouts()
        (call,) = reader.calls()
    assert (rollout.rollout_id, rollout.group_id, rollout.task_id) == (told.json["rollout_id"], "g1", "t1")
    assert (rollout.harness, rollout.status, rollout.exit_code) == (Path(sys.executable).name, "completed", 0)
    assert len(call.completion_token_ids) == told.json["sampled_tokens"]


def test_a_workspace_of_our_own_stays_if_something_is_in_it(
    polar: Polar, run: list[str], tmp_path: Path
) -> None:
    empty = polar(*run, "--json", "--", "true")
    assert (empty.code, empty.json["workspace"]) == (0, None)
    assert not list(tmp_path.glob("polar-mitm-workspace-*"))
    full = polar(*run, "--json", "--", "sh", "-c", "echo made > it")
    assert (Path(full.json["workspace"]) / "it").read_text() == "made\n"


def test_a_deadline(polar: Polar, run: list[str], tmp_path: Path) -> None:
    told = polar(*run, "--timeout", 0.5, "--json", "--", "sleep", "1000")
    assert (told.code, told.json["status"], told.json["exit_code"]) == (124, "timeout", 124)
    with open_reader(tmp_path / "new.duckdb") as reader:
        assert [(r.status, r.exit_code) for r in reader.rollouts()] == [("timeout", 137)]  # as it was killed


def test_a_recipe_of_ones_own(
    polar: Polar, run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program is this machine's, and its host a name that nobody but the recipe knows."""
    (tmp_path / "asker.toml").write_text(
        f"""title = "Asker"
        [hosts]
        "Models.Example" = "anthropic"
        [run]
        program = "{Path(sys.executable).name}"
        argv = ["-c", {json.dumps(ASK.replace("api.anthropic.com", "models.example"))}, "{{prompt}}"]
        """
    )
    recipe = ["--json", "--harness", tmp_path / "asker.toml", "--prompt", "go"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    told = polar(*run, *recipe)
    assert (told.code, told.json["name"], told.json["calls"]) == (0, "asker", 1), told.err
    assert told.json["refused"] == []
    with open_reader(tmp_path / "new.duckdb") as reader:
        query = "SELECT dialect, http ->> 'host' AS host FROM calls JOIN wire USING (call_id)"
        (seen,) = reader.sql(query).to_pylist()
    assert seen == {"dialect": "anthropic", "host": "models.example"}


@pytest.mark.parametrize(("flags", "read"), [((), ""), (("--stdin",), "x\n")])
def test_standard_input_where_asked_for(flags: tuple[str, ...], read: str, run: list[str]) -> None:
    command = [POLAR_MITM, *run, *flags, "--", "cat"]
    done = subprocess.run(command, input="x\n", capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, read), done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_recorded_as_such(
    number: signal.Signals, code: int, run: list[str], tmp_path: Path
) -> None:
    with launch(*run, "--", "sh", "-c", "echo running; exec sleep 1000") as process:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        process.send_signal(number)
        told = finish(process)
    assert told.code == code
    assert told.err.splitlines()[-1] == "error: interrupted"
    assert not (tmp_path / "new.duckdb.live.json").exists()
    with open_reader(tmp_path / "new.duckdb") as reader:
        assert [(r.status, r.exit_code) for r in reader.rollouts()] == [("interrupted", None)]


def test_an_interruption_is_a_document_too(run: list[str]) -> None:
    with launch(*run, "--json", "--", "sh", "-c", "echo running >&2; exec sleep 1000") as process:
        assert process.stderr is not None
        while process.stderr.readline() != "running\n":
            pass
        process.send_signal(signal.SIGTERM)
        told = finish(process)
    assert told.json == {"error": "interrupted", "kind": "interrupted", "exit_code": 143}


def test_settings_come_from_file_environment_and_options(
    polar: Polar, run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.toml").write_text("max_tokens = 3\ntemperature = 0.5\n")
    monkeypatch.setenv("POLAR_MITM_TEMPERATURE", "0.25")
    told = polar(*run, "--config", tmp_path / "s.toml", "--max-tokens", 2, "--", sys.executable, "-c", ASK)
    assert told.code == 0
    with open_reader(tmp_path / "new.duckdb") as reader:
        (call,) = reader.calls()
    assert (call.sampling.max_tokens, call.sampling.temperature) == (2, 0.25)
    assert len(call.completion_token_ids) == 2
