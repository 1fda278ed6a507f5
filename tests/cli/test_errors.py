"""What goes wrong is told in a sentence, an exit code, and with --json a document. Never a traceback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from polar_mitm import engine
from polar_mitm.cli import main
from tests.cli.conftest import Polar, launch

HELD = "import duckdb, sys; con = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def place(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the good store in it, and bad things beside it."""
    monkeypatch.chdir(tmp_path)
    Path("runs.duckdb").write_bytes(store.read_bytes())
    Path("text.duckdb").write_text("not a database at all\n" * 500)
    duckdb.connect("other.duckdb").execute("CREATE TABLE t (i INTEGER)").close()
    Path("folder").mkdir()
    Path("there.parquet").write_text("mine")
    Path("bad.toml").write_text("x = [")
    Path("key.toml").write_text("colour = 1")
    Path("value.toml").write_text("max_tokens = 0")
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    Path("recipe.toml").write_text("title = 'x'")
    return tmp_path


READING = [
    ("calls --store nowhere.duckdb", 2, "there is no store"),
    ("calls --store folder", 2, "is a directory"),
    ("calls --store text.duckdb", 2, "not a DuckDB file"),
    ("calls --store other.duckdb", 2, "not a polar-mitm store"),
    ("calls", 2, "--store"),
    ("calls --store runs.duckdb --rollout nope", 2, "has no rollout 'nope'"),
    ("calls --store runs.duckdb --rollout ''", 2, "has no rollout ''"),
    ("show nope --store runs.duckdb", 2, "has no call 'nope'"),
    ("show '' --store runs.duckdb", 2, "has no call ''"),
    ("show rollout-A --store runs.duckdb", 2, "may be rollout-A-call-0, rollout-A-call-1"),
    ("show nope --store text.duckdb", 2, "not a DuckDB file"),
    ("reconstruct --store runs.duckdb --rollout nope", 2, "has no rollout"),
    ("reconstruct --store nowhere.duckdb", 2, "there is no store"),
    ("export --store nowhere.duckdb --out new.parquet", 2, "there is no store"),
    ("export --store runs.duckdb --out there.parquet", 2, "--force overwrites it"),
    ("export --store runs.duckdb --out folder", 2, "is a directory"),
    ("export --store runs.duckdb --out no/such/dir.parquet", 2, "there is no directory"),
    ("export --store runs.duckdb --out /proc/new.parquet", 2, "cannot be written"),
    ("export --store runs.duckdb --out new.parquet --what everything", 2, "'trajectories', 'calls'"),
    ("export --store runs.duckdb --out new.parquet --rollout nope", 2, "has no rollout"),
    ("frobnicate", 2, "No such command"),
    ("calls --frobnicate", 2, "No such option"),
]
ENGINES = [
    ("engine probe --engine http://127.0.0.1:9", 3, "no engine answers at http://127.0.0.1:9"),
    ("engine probe --engine 127.0.0.1:9/v1/", 3, "no engine answers at http://127.0.0.1:9:"),
    ("engine probe --engine ftp://127.0.0.1", 2, "http://127.0.0.1:8000"),
    ("engine probe --engine http://", 2, "http://127.0.0.1:8000"),
    ("engine probe --engine http://127.0.0.1:999999", 2, "http://127.0.0.1:8000"),
    ("engine probe --engine http://[::1", 2, "http://127.0.0.1:8000"),
    ("engine probe --engine {engine} --model gpt-17", 3, "has no model 'gpt-17', only scripted"),
    ("engine up --max-model-len 0", 2, "--max-model-len"),
    ("engine up --port 70000", 2, "--port"),
]
RUNNING = [
    ("run --store new.duckdb --engine {engine}", 125, "nothing to run"),
    ("run --engine {engine} -- true", 125, "--store FILE"),
    ("run --store folder --engine {engine} -- true", 125, "is a directory"),
    ("run --store text.duckdb --engine {engine} -- true", 125, "not a DuckDB file"),
    ("run --store new.duckdb --engine http://127.0.0.1:9 -- true", 125, "no engine answers"),
    (
        "run --store new.duckdb --engine {engine} -- no-such-program",
        125,
        "no program called 'no-such-program'",
    ),
    (
        "run --store new.duckdb --engine {engine} --harness nope --prompt x",
        125,
        "there are claude-code, codex, gemini-cli, opencode, pi, qwen-code, sdk-agent",
    ),
    (
        "run --store new.duckdb --engine {engine} --harness recipe.toml --prompt x",
        125,
        "not a harness recipe",
    ),
    ("run --store new.duckdb --engine {engine} --harness no.toml --prompt x", 125, "no harness recipe"),
    ("run --store new.duckdb --engine {engine} --harness codex", 125, "--prompt TEXT"),
    ("run --store new.duckdb --engine {engine} --harness codex --prompt x -- codex", 125, "not both"),
    ("run --store new.duckdb --engine {engine} --prompt x -- true", 125, "takes its prompt after --"),
    ("run --store new.duckdb --engine {engine} --env WRONG -- true", 125, "NAME=VALUE, not 'WRONG'"),
    ("run --store new.duckdb --engine {engine} --config no.toml -- true", 125, "there is no file no.toml"),
    ("run --store new.duckdb --engine {engine} --config folder -- true", 125, "there is no file folder"),
    ("run --store new.duckdb --engine {engine} --config bad.toml -- true", 125, "is not TOML"),
    ("run --store new.duckdb --engine {engine} --config binary.toml -- true", 125, "is not TOML"),
    (
        "run --store new.duckdb --engine {engine} --config key.toml -- true",
        125,
        "there is no setting 'colour'",
    ),
    ("run --store new.duckdb --engine {engine} --config value.toml -- true", 125, "setting max_tokens"),
    ("run --store new.duckdb --engine {engine} --max-tokens 0 -- true", 125, "--max-tokens"),
    ("run --store new.duckdb --engine {engine} --timeout 0 -- true", 125, "--timeout"),
    ("run --store new.duckdb --engine {engine} --task-dir no -- true", 125, "is not a directory"),
    ("run --store new.duckdb --engine {engine} --read-only no -- true", 125, "does not exist"),
    ("run --store folder/new.duckdb --engine {engine} --task-dir folder -- true", 125, "would be visible"),
    ("run --control no.sock -- true", 125, "start one with `polar-mitm up"),
    ("run --control dead.sock -- true", 125, "start one with `polar-mitm up"),
    ("run --control runs.duckdb -- true", 125, "no interceptor answers"),
    ("run --control no.sock --store new.duckdb -- true", 125, "--control stands alone"),
    ("up --store folder --engine {engine}", 2, "is a directory"),
    ("up --store text.duckdb --engine {engine}", 2, "not a DuckDB file"),
    ("up --store new.duckdb --control there.parquet --engine {engine}", 2, "is no socket"),
    (f"up --store new.duckdb --control {'s' * 120} --engine {{engine}}", 2, "too long"),
    ("up --store new.duckdb --engine http://127.0.0.1:9", 3, "no engine answers"),
    ("demo --store folder", 2, "is a directory"),
    ("demo --timeout 0", 2, "--timeout"),
    (
        "demo --harness codex --harness nope",
        2,
        "takes one of claude-code, codex, gemini-cli, opencode, pi, qwen-code",
    ),
]


@pytest.mark.parametrize(("line", "code", "message"), READING + ENGINES + RUNNING)
def test_errors_say_what_to_do(
    line: str, code: int, message: str, polar: Polar, place: Path, engine_url: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind("dead.sock")
    command = [each.strip("'").format(engine=engine_url) for each in line.split()]

    told = polar(*command)
    assert (told.code, told.out) == (code, "")
    assert message in " ".join(told.err.replace("│", "").split())

    name = 2 if command[0] == "engine" else 1
    told = polar(*command[:name], "--json", *command[name:])
    assert told.code == code
    assert message in told.json["error"]
    assert told.json["exit_code"] == code
    assert told.json["kind"] == {3: "engine", 4: "setup"}.get(code, told.json["kind"]) != "bug"
    assert Path("there.parquet").read_text() == "mine"
    assert not list(place.glob("*rescue*")) + list(place.glob("*.partial"))


@pytest.fixture
def locked(tmp_path: Path, store: Path) -> Iterator[Path]:
    """A store that a foreign program has open for writing."""
    path = tmp_path / "locked.duckdb"
    path.write_bytes(store.read_bytes())
    command = [sys.executable, "-c", HELD, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield path
        holder.communicate("")


@pytest.mark.parametrize("command", ["calls", "reconstruct"])
def test_a_locked_store_is_named_with_who_locks_it(command: str, polar: Polar, locked: Path) -> None:
    told = polar(command, "--store", locked, "--json")
    assert told.code == 2
    assert "is locked by process" in told.json["error"]


def test_a_run_on_a_locked_store_goes_on_and_says_so(polar: Polar, locked: Path, engine_url: str) -> None:
    told = polar("run", "--store", locked, "--engine", engine_url, "--json", "--", "true")
    assert (told.code, told.json["status"]) == (0, "completed")
    assert "locked" in told.json["incomplete"]
    assert "rescue" in told.json["store"] and Path(told.json["store"]).exists()
    assert "marked incomplete" in told.err


def test_no_engine_at_all(polar: Polar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLAR_MITM_CACHE", str(tmp_path))
    told = polar("run", "--store", tmp_path / "new.duckdb", "--", "true")
    assert told.code == 125 and "polar-mitm engine up" in told.err
    assert polar("engine", "probe").code == 3
    told = polar("engine", "status", "--json")
    assert (told.code, told.json) == (1, {"running": False, "answers": False, "engine": None})
    told = polar("engine", "down", "--json")
    assert (told.code, told.json) == (0, {"stopped": False, "engine": None})


NEEDING = [
    "engine probe",
    "run --store new.duckdb -- true",
    "up --store new.duckdb",
    "verify runs.duckdb",
    "replay rollout-A --store runs.duckdb --fork-at call-0",
]


@pytest.mark.parametrize("line", NEEDING)
def test_the_managed_engine_may_be_named(
    line: str, polar: Polar, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLAR_MITM_CACHE", str(place / "cache"))
    first, dashes, last = line.partition(" --")
    told = polar(*f"{first} --engine managed{dashes}{last}".split())
    assert "no engine: start one with `polar-mitm engine up`" in told.err


def test_the_managed_engine_is_found_by_its_name(
    polar: Polar, place: Path, engine_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = engine.EngineState(engine_url, 1, "", "scripted", "scripted", "float32", "", 0.0)
    monkeypatch.setattr("polar_mitm.engine.status", lambda: state)
    Path("managed.toml").write_text("engine = 'managed'")
    assert polar("engine", "probe", "--engine", "managed", "--json").json["url"] == engine_url
    told = polar("run", "--config", "managed.toml", "--store", "new.duckdb", "--json", "--", "true")
    assert told.code == 0, told.err


def test_a_bug_of_ours_is_told_as_one(
    store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("what was that")

    monkeypatch.setattr("polar_mitm.cli.calls.chosen", broken)
    with pytest.raises(SystemExit) as end:
        main(["calls", "--store", str(store), "--json"])
    out, err = capfd.readouterr()
    assert end.value.code == 70
    assert json.loads(out)["kind"] == "bug" and "what was that" in json.loads(out)["error"]
    assert "Traceback" in err and "in broken" in err


def test_a_reader_who_has_seen_enough_is_no_error(store: Path) -> None:
    with launch("calls", "--store", store) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None and process.stderr.read().count("\n") <= 1  # its own remark at most
