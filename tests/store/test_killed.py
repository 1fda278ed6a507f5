"""What a capture that was killed left running is interrupted and incomplete, and is not trained on."""

from __future__ import annotations

import time
from pathlib import Path

import duckdb
import pytest

from polar_mitm.reconstruct import build
from polar_mitm.store import Recorder, open_reader
from polar_mitm.types import Rollout
from tests.store.calls import call, python

KILLED = ("interrupted", "the capture was killed", "the capture ended before the rollout did")
EXPECTED = {
    "ended": ("completed", None, None),
    "holed": ("interrupted", "the capture was killed", "the disk was full"),
    "r1": KILLED,
}
"""Status, stop reason and holes of each rollout of `WRITER` once it is dead."""

WRITER = """
import sys, time
from pathlib import Path
from polar_mitm.store import Recorder
from polar_mitm.types import Rollout
from tests.store.calls import call
recorder = Recorder(Path(sys.argv[1]))
recorder.open()
for rollout in (
    Rollout("r1"), Rollout("holed", incomplete="the disk was full"), Rollout("ended", status="completed")
):
    assert recorder.rollout(rollout).result()
assert recorder.call(call("a", [1, 2], [3, 4])).result()
print("stored", flush=True)
time.sleep(1000)
"""

Endings = dict[str, tuple[str, str | None, str | None]]


def endings(path: Path) -> Endings:
    with open_reader(path) as reader:
        return {r.rollout_id: (r.status, r.stop_reason, r.incomplete) for r in reader.rollouts()}


def written(path: Path) -> Endings:
    """The same, as the file has it."""
    with duckdb.connect(str(path), read_only=True) as con:
        rows = con.execute("SELECT rollout_id, status, stop_reason, incomplete FROM rollouts").fetchall()
    return {rollout_id: (status, stop, holes) for rollout_id, status, stop, holes in rows}


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A store whose recorder was killed; while it lived, its rollouts were running."""
    path = tmp_path / "s.duckdb"
    process = python(WRITER, path)
    try:
        assert process.stdout and process.stdout.readline() == "stored\n"
        assert {i: status for i, (status, *_) in endings(path).items()} == {
            "r1": "running",
            "holed": "running",
            "ended": "completed",
        }
    finally:
        process.kill()
        process.communicate()
    return path


def test_a_reader_says_so_without_writing(killed: Path) -> None:
    assert endings(killed) == EXPECTED
    assert written(killed)["r1"] == ("running", None, None)


def test_nothing_of_it_is_trained_on(killed: Path) -> None:
    with open_reader(killed) as reader:
        rollout = next(r for r in reader.rollouts() if r.rollout_id == "r1")
        trajectories, report = build(reader.calls("r1"), rollout=rollout)
    assert not trajectories
    assert (report.sampled, report.trained, report.quarantined) == (2, 0, {"incomplete_rollout": 2})


def test_the_next_recorder_writes_it_down_and_leaves_its_own_alone(killed: Path) -> None:
    with Recorder(killed) as recorder:
        assert recorder.rollout(Rollout("own")).result()
        assert endings(killed) == EXPECTED | {"own": ("running", None, None)}  # through the live recorder
        assert recorder.rollout(Rollout("own", status="completed")).result()
    assert written(killed) == EXPECTED | {"own": ("completed", None, None)}


def test_a_recorder_that_opens_its_store_again_leaves_its_own_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    alarms: list[str] = []
    with Recorder(path, on_alarm=alarms.append, share=False) as recorder:
        assert recorder.rollout(Rollout("own")).result()
        hold = recorder._hold
        assert hold
        hold.writer.con.close()
        assert not recorder.call(call("lost", rollout_id="other")).result()
        for _ in range(100):
            if recorder.call(call("kept", rollout_id="other")).result():
                break
            time.sleep(0.1)
        assert recorder._hold not in (None, hold)
        assert recorder.rollout(Rollout("own", status="completed")).result()
    assert written(path)["own"] == ("completed", None, None)
