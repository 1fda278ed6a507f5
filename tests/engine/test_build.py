"""What is in the cache is whole, or is built again."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from polar_mitm.engine import build
from polar_mitm.errors import SetupError


class Workshop:
    """Builds a folder with one file, and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.builds = 0
        self.steps: list[str] = []

    def __call__(self, folder: Path) -> None:
        assert list(folder.iterdir()) == []
        self.builds += 1
        (folder / "product").write_text("good")

    def once(self, fingerprint: str = "v1") -> Path:
        return build.build_once(self.folder, fingerprint, "product", self, self.steps.append, 0.0)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "below" / "thing")


def test_builds_once(workshop: Workshop) -> None:
    assert workshop.once() == workshop.once() == workshop.folder
    assert workshop.builds == 1


def test_builds_again_for_another_fingerprint(workshop: Workshop) -> None:
    workshop.once("v1")
    workshop.once("v2")
    assert workshop.builds == 2


def test_builds_again_what_lost_its_product(workshop: Workshop) -> None:
    (workshop.once() / "product").unlink()
    assert (workshop.once() / "product").read_text() == "good"


def test_a_half_made_folder_is_removed_and_made_again(workshop: Workshop) -> None:
    workshop.folder.mkdir(parents=True)
    (workshop.folder / "product").write_text("half")
    assert (workshop.once() / "product").read_text() == "good"
    assert any("Removing" in step for step in workshop.steps)


def test_a_build_that_fails_does_not_count(tmp_path: Path, workshop: Workshop) -> None:
    def fails(folder: Path) -> None:
        (folder / "product").write_text("half")
        raise SetupError("no network")

    with pytest.raises(SetupError, match="no network"):
        build.build_once(workshop.folder, "v1", "product", fails, print, 0.0)
    assert (workshop.once() / "product").read_text() == "good"


def test_two_at_once_build_once(workshop: Workshop) -> None:
    gate = threading.Barrier(2)

    def racer(_: int) -> Path:
        gate.wait()
        return workshop.once()

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(racer, range(2))) == {workshop.folder}
    assert workshop.builds == 1


def test_no_room(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1.2e9))
    with pytest.raises(SetupError, match=r"1\.2 GB free.*needs 4.*POLAR_MITM_CACHE"):
        build.build_once(workshop.folder, "v1", "product", workshop, print, 4)
    assert workshop.builds == 0


def test_a_failing_command_ends_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "print('first'); print('the reason'); raise SystemExit(3)"
    with pytest.raises(SetupError, match=r"(?s)making it failed .*log.*the reason"):
        build.run([sys.executable, "-c", script], "making it", log)
    with pytest.raises(SetupError, match="making it failed"):
        build.run([tmp_path / "no-such-program"], "making it", log)


def test_tail_keeps_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(map(str, range(100))))
    assert build.tail(log, 2) == "98\n99"
    assert build.tail(tmp_path / "none") == ""


def _interpreter(path: Path, answer: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no Python but those that a test puts there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    real = build._makes_environments
    inside = str(tmp_path)
    monkeypatch.setattr(
        build,
        "_makes_environments",
        lambda python, version: python.startswith(inside) and real(python, version),
    )
    return tmp_path


def test_find_python_prefers_3_11(machine: Path) -> None:
    _interpreter(machine / "bin" / "python3.12", "echo CPython 3.12.4")
    _interpreter(machine / ".pyenv" / "versions" / "3.11.7" / "bin" / "python", "echo CPython 3.11.7")
    assert build.find_python() == str(machine / ".pyenv" / "versions" / "3.11.7" / "bin" / "python")


def test_find_python_passes_over_those_that_do_not_work(machine: Path) -> None:
    _interpreter(machine / "bin" / "python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    _interpreter(machine / "bin" / "python3.12", "echo \"No module named 'ensurepip'\" >&2; exit 1")
    _interpreter(machine / "bin" / "python3.13", "echo PyPy 3.13.0")
    _interpreter(machine / "bin" / "python3.14", "echo CPython 3.14.1")
    assert build.find_python() == str(machine / "bin" / "python3.14")


def test_find_python_says_what_to_install(machine: Path) -> None:
    with pytest.raises(SetupError, match="python3-venv"):
        build.find_python()


def test_the_real_check_accepts_this_python() -> None:
    version = "{}.{}".format(*sys.version_info[:2])
    assert build._makes_environments(sys.executable, version)
    assert not build._makes_environments(sys.executable, "2.7")
    assert not build._makes_environments(os.devnull, version)


def test_other_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    build.check_platform("it")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SetupError, match="--engine URL"):
        build.check_platform("it")
