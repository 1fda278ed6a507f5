"""`polar-mitm conformance`: what it refuses, what it tells, and that nothing of it stays."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from polar_mitm.conformance.scenarios import SCENARIOS
from polar_mitm.store import open_reader
from tests.cli.conftest import Polar, finish, launch

IDLE = 'title = "Idle"\n[run]\nprogram = "true"\n'
"""A recipe of a harness that does nothing at all, and calls that a success."""


@pytest.fixture
def idle(tmp_path: Path) -> Path:
    file = tmp_path / "idle.toml"
    file.write_text(IDLE)
    return file


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--scenario", "no-such"], "there is no scenario 'no-such': there are two-turns"),
        (["--scenario", "cut", "--fast"], "not both"),
        (["no-such-harness"], "no harness recipe 'no-such-harness'"),
        (["--markdown", "/no/such/dir/x.md"], "there is no directory /no/such/dir"),
        (["--jobs", "0"], "greater than or equal to 1"),
        (["--out", "/usr"], "takes a new or empty directory"),
        (["--out", "/etc/hostname"], "takes a new or empty directory"),
    ],
)
def test_what_it_refuses(polar: Polar, arguments: list[str], complaint: str) -> None:
    done = polar("conformance", *arguments, "--json")
    assert done.code == 2 and complaint in done.json["error"]


def test_every_scenario_is_in_the_help(polar: Polar) -> None:
    told = "".join(polar("conformance", "--help").out.split())
    assert all(name in told for name in SCENARIOS)


def test_a_harness_that_does_nothing_fails_with_reasons(polar: Polar, idle: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    done = polar(
        "conformance", idle, "--scenario", "two-turns", "--scenario", "resume", "--out", out, "--json"
    )
    assert done.code == 1 and not done.json["ok"]
    first, second = done.json["rows"]
    assert (first["harness"], first["scenario"], first["outcome"]) == ("idle", "two-turns", "fail")
    assert (first["exit_code"], first["calls"]) == (0, 0)
    assert any("no hello.txt" in each for each in first["reasons"])
    assert "it made no model call" in first["reasons"]
    assert second["outcome"] == "n/a" and "resume_argv" in second["reasons"][0]


def test_a_run_that_cannot_begin_has_failed_and_says_why(polar: Polar, idle: Path, tmp_path: Path) -> None:
    idle.write_text(IDLE.replace("true", "no-such-program"))
    done = polar("conformance", idle, "--scenario", "two-turns", "--out", tmp_path / "runs", "--json")
    assert done.code == 1
    (reason,) = done.json["rows"][0]["reasons"]
    assert reason.startswith("it could not be run: no program called 'no-such-program'")


def test_what_has_no_package_has_no_newest_version(polar: Polar, idle: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    given = ["--scenario", "trust-nothing", "--latest", "--markdown", page, "--out", tmp_path / "runs"]
    done = polar("conformance", idle, *given)
    assert done.code == 0, done.err  # it only asked
    (change,) = [line for line in done.out.splitlines() if "it cannot be had" in line]
    assert "has no package" in change and change.strip() in page.read_text()
    assert "| trust-nothing | the CA by nothing | no |" in page.read_text()


def test_a_harness_that_cannot_be_installed_is_told_apart(
    polar: Polar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: Path
) -> None:
    absent = tmp_path / "absent.toml"
    absent.write_text(
        'version = "1"\n[install]\nnpm = "no-such-package"\nbinary = "bin/x"\n[run]\nargv = ["{prompt}"]\n'
    )
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("POLAR_MITM_CACHE", str(tmp_path / "cache"))
    given = ["--scenario", "trust-nothing", "--out", tmp_path / "runs", "--json"]
    done = polar("conformance", absent, idle, *given)
    assert done.code == 1
    assert set(done.json["unavailable"]) == {"absent"} and len(done.json["rows"]) == 1
    alone = polar("conformance", absent, "--scenario", "trust-nothing", "--json")
    assert alone.code == 4 and "nothing to run" in alone.json["error"]


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_our_own_agent(polar: Polar, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    names = ["two-turns", "parallel", "unknown-tool", "engine-500", "image", "resume"]
    given = [word for name in names for word in ("--scenario", name)]
    done = polar("conformance", "sdk-agent", *given, "--out", out, "--json")
    assert done.code == 0, done.err
    rows = {row["scenario"]: row for row in done.json["rows"]}
    assert list(rows) == names
    assert [rows[name]["outcome"] for name in names] == ["pass"] * 4 + ["n/a"] * 2
    first = rows["two-turns"]
    assert first["transports"] == ["HTTP/1.1 stream"] and first["dialects"] == ["anthropic"]
    assert (first["followers"], first["continued"]) == (1, 1)
    assert rows["engine-500"]["statuses"] == {"failed": 1, "ok": 2}
    (store,) = out.glob("*/two-turns/run.duckdb")
    with open_reader(store) as reader:
        assert len(reader.calls()) == first["calls"] == 2


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_an_interrupt_ends_the_runs_in_good_order(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    with launch("conformance", "sdk-agent", "--scenario", "slow", "--out", out) as process:
        deadline = time.monotonic() + 100
        while not list(out.glob("*/slow/output.txt")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told = finish(process, 100)
    assert told.code == 130
    (store,) = out.glob("*/slow/run.duckdb")
    with open_reader(store) as reader:
        assert [r.status for r in reader.rollouts()] in ([], ["interrupted"])
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if _mentions(p, str(out))]


def _mentions(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes()
    except OSError:  # it has ended
        return False
