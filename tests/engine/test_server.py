"""Life and death of the managed server, with a stand-in for vLLM that has a worker of its own."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from polar_mitm import engine
from polar_mitm.engine import flags, server, state
from polar_mitm.engine.flags import Launch
from polar_mitm.errors import EngineUnfit, SetupError

_FAKE = Path(__file__).with_name("fake_vllm.py")
Play = Callable[[str], None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """Make `up` start the stand-in, in a cache of its own; nothing of it survives the test."""
    monkeypatch.setenv("POLAR_MITM_CACHE", str(tmp_path))
    model = tmp_path / "a-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(server, "ensure_env", lambda cache, on_step: Path(sys.executable))
    monkeypatch.setattr(server, "ensure_model", lambda cache, name, on_step: model)
    launched: list[int] = []
    spawn = server._spawn

    def noted(python: Path, launch: Launch, log: Path) -> tuple[subprocess.Popen[bytes], engine.EngineState]:
        process, started = spawn(python, launch, log)
        launched.append(started.pid)
        return process, started

    monkeypatch.setattr(server, "_spawn", noted)

    def choose(mode: str) -> None:
        monkeypatch.setattr(
            flags, "command", lambda python, launch: [sys.executable, str(_FAKE), str(launch.port), mode]
        )

    choose("ready")
    yield choose
    for pid in launched:
        for member in _session(pid):
            os.kill(member, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    """The living processes of a session, by the kernel's word and not by our reading of /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                zombie = "State:\tZ" in (entry / "status").read_text()
                found += [] if zombie else [int(entry.name)]
        except OSError:
            continue
    return found


def _wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in 10 s")


def test_up_answers_and_down_leaves_nothing(play: Play, tmp_path: Path) -> None:
    steps: list[str] = []
    started = engine.up(on_step=steps.append)

    assert engine.healthy(started.url)
    assert started.max_model_len == 4096
    assert engine.status() == started
    file = tmp_path / "engine" / "state.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(_session(started.pid)) == 2  # the server and its worker
    assert any("Starting vLLM" in step for step in steps)

    assert engine.down() == started
    assert _session(started.pid) == []
    assert engine.status() is None
    assert engine.down() is None


def test_a_second_up_returns_the_running_one(play: Play) -> None:
    started = engine.up(model="a-model")
    assert engine.up() == started
    assert engine.up(model="a-model") == started
    assert engine.up(model=started.model) == started


@pytest.mark.parametrize("other", [{"model": "org/other"}, {"dtype": "float16"}, {"dev": True}, {"lora": 8}])
def test_up_does_not_pass_off_another_engine(play: Play, other: dict[str, object]) -> None:
    started = engine.up(dtype="float32")
    with pytest.raises(SetupError, match=r"engine down"):
        engine.up(**other)  # type: ignore[arg-type]
    assert engine.status() == started


def test_what_can_do_more_does(play: Play) -> None:
    started = engine.up(lora=16)
    assert (started.dev, started.lora) == (True, 16)
    assert engine.up(dev=True) == engine.up(lora=8) == engine.up() == started
    with pytest.raises(SetupError, match=r"\(float32, dev, lora\), not what is asked for"):
        engine.up(lora=17)


def test_what_cannot_be_is_refused_before_anything_starts(play: Play) -> None:
    with pytest.raises(SetupError, match="rank 512 at most"):
        engine.up(lora=513)
    with pytest.raises(SetupError, match="no GPU"):
        engine.up(transfer=True)
    assert engine.status() is None


def test_two_ups_at_once_start_one_server(play: Play) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: engine.up(), range(2))
    assert first == second


def test_a_dead_server_is_not_running(play: Play) -> None:
    started = engine.up()
    os.kill(started.pid, signal.SIGKILL)
    _wait_until(lambda: engine.status() is None)
    assert len(_session(started.pid)) == 1  # its worker lives on, as vLLM's do
    assert engine.down() == started
    assert _session(started.pid) == []


def test_up_after_a_crash_clears_up_first(play: Play) -> None:
    crashed = engine.up()
    os.kill(crashed.pid, signal.SIGKILL)
    _wait_until(lambda: engine.status() is None)
    assert engine.up().pid != crashed.pid
    assert _session(crashed.pid) == []


def test_a_server_that_ignores_the_request_is_killed(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    play("stubborn")
    started = engine.up()
    state.terminate(started, patience_s=0.2)
    assert _session(started.pid) == []


def test_a_server_that_breaks_says_why(play: Play) -> None:
    play("broken")
    with pytest.raises(EngineUnfit, match=r"ValueError: too little KV cache$"):
        engine.up()
    assert engine.status() is None


def test_a_server_that_never_answers_is_given_up(play: Play, tmp_path: Path) -> None:
    play("silent")
    with pytest.raises(EngineUnfit, match="does not answer"):
        engine.up(timeout_s=1.0)
    assert not (tmp_path / "engine" / "state.json").exists()


def test_an_interrupted_up_leaves_nothing(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    born: list[int] = []

    def interrupted(url: str) -> bool:
        running = engine.status()
        assert running is not None
        born.append(running.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "healthy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.up()
    assert _session(born[0]) == []


def test_a_reused_pid_is_not_the_engine(play: Play, tmp_path: Path) -> None:
    started = engine.up()
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    try:
        state.write(tmp_path / "engine" / "state.json", msgspec.structs.replace(started, pid=bystander.pid))
        assert engine.status() is None
        assert engine.down() is None
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        state.terminate(started)


def test_a_state_of_another_boot_is_nobody(play: Play) -> None:
    started = engine.up()
    stale = msgspec.structs.replace(started, birth=f"another-boot:{started.birth.split(':')[1]}")
    assert not state.alive(stale)
    assert state.members(stale) == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": "x"}', b"[]"])
def test_a_broken_state_file_counts_as_none(play: Play, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "state.json").write_bytes(content)
    assert engine.status() is None
    assert engine.down() is None
    assert engine.healthy(engine.up().url)


def test_the_log_of_the_last_start_is_kept(play: Play) -> None:
    play("broken")
    with pytest.raises(EngineUnfit):
        engine.up()
    play("ready")
    log = Path(engine.up().log)
    assert "too little KV cache" in log.with_suffix(".previous.log").read_text()
