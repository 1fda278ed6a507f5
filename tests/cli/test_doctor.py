"""`polar-mitm doctor` on this machine, and on one that lacks things."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from polar_mitm.cli import doctor
from tests.cli.conftest import Polar


@pytest.fixture
def poor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose PATH is this folder; it has what a sandbox needs but bubblewrap."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("setpriv", "true"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_this_machine_can_run_sandboxes(polar: Polar) -> None:
    told = polar("doctor", "--json")
    assert (told.code, told.json["ok"], told.json["problems"]) == (0, True, [])
    checks = {check["name"]: check for check in told.json["checks"]}
    assert {
        "bwrap",
        "sandbox",
        "npm",
        "claude-code",
        "codex",
        "engine",
        "h11",
        "disk",
        "memory",
        "cache",
    } <= set(checks)
    assert checks["duckdb-extension-quack"]["detail"] == checks["duckdb-extension-httpfs"]["detail"]
    assert checks["duckdb"]["detail"] == version("duckdb")
    assert all(check["fix"] for check in checks.values() if not check["ok"])
    listed = polar("doctor")
    assert listed.code == 0 and all(name in listed.out for name in checks)


def test_something_required_is_missing(polar: Polar, poor: Path) -> None:
    told = polar("doctor")
    assert told.code == 1
    assert "NEEDED: bwrap: apt-get install bubblewrap" in told.out
    assert told.out.splitlines()[-1] == "something that is required is missing"
    document = polar("doctor", "--json")
    assert (document.code, document.json["ok"]) == (1, False)
    assert {c["name"] for c in document.json["checks"] if c["required"] and not c["ok"]} == {"bwrap"}


def test_fix_gets_bubblewrap_where_it_may(poor: Path, tmp_path: Path) -> None:
    log = tmp_path / "asked"
    apt = poor / "apt-get"
    apt.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" = update ] || /bin/ln -s /bin/true {poor}/bwrap\n')
    apt.chmod(0o755)
    problem = doctor.install_bubblewrap()
    if os.getuid() == 0:
        assert problem is None
        assert log.read_text().splitlines() == [
            "update -qq",
            "install -y -qq --no-install-recommends bubblewrap",
        ]
        assert doctor.install_bubblewrap() is None and len(log.read_text().splitlines()) == 2  # once
    else:
        assert problem is not None and "apt-get install bubblewrap" in problem and not log.exists()


def test_what_could_not_be_fixed_is_listed(polar: Polar, poor: Path) -> None:
    (poor / "apt-get").write_text("#!/bin/sh\necho 'no network here' >&2\nexit 100\n")
    (poor / "apt-get").chmod(0o755)
    problem = doctor.install_bubblewrap()
    assert problem is not None
    assert "no network here" in problem or os.getuid() != 0


def test_a_missing_extension_is_named_with_its_cure() -> None:
    check = doctor._extension("nonsense")
    assert not check.ok and check.required
    assert check.fix == f"pip install duckdb-extension-nonsense=={version('duckdb')}"


@pytest.mark.e2e
@pytest.mark.timeout(1800)
def test_fix_is_idempotent(polar: Polar) -> None:
    """After the first time nothing is installed, and nothing is said to be."""
    assert polar("doctor", "--fix").code == 0
    again = polar("doctor", "--fix", "--json")
    assert (again.code, again.err, again.json["problems"]) == (0, "", [])
