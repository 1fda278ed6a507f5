"""A run's own database: steps and their rows, down to the wire; read while it is written; rewound."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import numpy as np
import pytest

from polar_mitm.cli import main
from polar_mitm.errors import StoreError
from polar_mitm.types import Rollout
from polar_mitm_trainer import rundb
from polar_mitm_trainer.rundb import RunDB, StepRow, differences, step_rows
from polar_mitm_trainer.samples import Sample, weigh
from tests.cli.conftest import record, sampled

TO_THE_WIRE = """
    SELECT s.step, s.policy_version, r.trajectory_id, r.advantage, c.call_id, w.request_body, w.response_body
    FROM steps s
    JOIN step_rows r USING (run_id, step)
    JOIN store.trajectories t ON t.trajectory_id = r.trajectory_id AND t.builder = 'forest'
    JOIN store.calls c ON list_contains([span.call_id for span in t.spans], c.call_id)
    JOIN store.wire w ON w.call_id = c.call_id
    ORDER BY s.step, c.seq
"""
ROW = StepRow("t", "r", "g", 0.5, 1.0, 3, "step-0")


def sample(trajectory_id: str, rollout_id: str, mask: list[int], advantage: float) -> Sample:
    loss_mask = np.array(mask, np.uint8)
    zeros = np.zeros(loss_mask.size, np.float32)
    return Sample(
        trajectory_id,
        rollout_id,
        "group",
        np.arange(loss_mask.size, dtype=np.int32),
        loss_mask,
        zeros,
        (loss_mask * advantage).astype(np.float32),
        zeros,
        "step-0",
    )


def test_rows_say_what_share_of_the_step_was_theirs() -> None:
    samples = [
        sample("a", "1", [0, 1, 1], 2.0),
        sample("b", "1", [1, 1, 0], 2.0),
        sample("c", "2", [1], -2.0),
    ]
    rows = step_rows(weigh(samples, "rollout"))
    assert [row.advantage for row in rows] == [2.0, 2.0, -2.0]
    assert [row.weight for row in rows] == pytest.approx([0.25, 0.25, 0.5])
    assert [row.num_trained for row in rows] == [2, 2, 1]


def test_a_step_leads_to_the_bytes_of_its_calls(tmp_path: Path) -> None:
    store = tmp_path / "store.duckdb"
    calls = [sampled("rollout-A", 0, 10, 4), sampled("rollout-A", 1, 20, 6), sampled("rollout-B", 0, 5, 2)]
    record(store, [Rollout(r, status="completed") for r in ("rollout-A", "rollout-B")], calls, [])
    with pytest.raises(SystemExit, match="0"):
        main(["reconstruct", "-s", str(store), "--write"])
    db = RunDB(tmp_path, "run-1")
    db.begin("train", "a run", {"loss": "grpo"}, store)
    db.snapshot("snap", "SELECT ...", store, [("rollout-A-call-1", "rollout-A")])
    rows = [StepRow("rollout-A-call-1", "rollout-A", "g", 0.75, 1.0, 10, None)]
    db.step(1, rows, {"loss": 0.25}, policy_version="step-1", started_at=1.0, snapshot_id="snap")
    db.end("done")
    with duckdb.connect() as con:
        con.execute(f"ATTACH '{db.path}' AS run (READ_ONLY)")
        con.execute(f"ATTACH '{store}' AS store (READ_ONLY)")
        con.execute("USE run")
        found = con.execute(TO_THE_WIRE).fetchall()
    assert [row[:5] for row in found] == [
        (1, "step-1", "rollout-A-call-1", 0.75, "rollout-A-call-0"),
        (1, "step-1", "rollout-A-call-1", 0.75, "rollout-A-call-1"),
    ]
    assert all(request and response for *_, request, response in found)


def test_others_read_between_steps_and_hold_nothing_up(tmp_path: Path) -> None:
    db = RunDB(tmp_path, "run")
    db.begin("rl", "", {}, None)
    db.step(1, [ROW], {"reward": 0.5}, policy_version="step-1", started_at=1.0)
    code = (
        f"import duckdb, sys; c = duckdb.connect({str(db.path)!r}, read_only=True)\n"
        "print(1, flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "1\n"
        db.step(2, [ROW], {"reward": 0.75, "odd": math.nan}, policy_version="step-2", started_at=2.0)
        reader.communicate()
    db.step(3, [], {"reward": 1.0}, policy_version="step-2", started_at=3.0)
    assert db.series("reward") == ([1, 2, 3], [0.5, 0.75, 1.0])
    assert db.series("odd") == ([], [])
    with duckdb.connect(str(db.path), read_only=True) as con:
        assert con.execute("SELECT step, num_trained FROM steps ORDER BY step").fetchall() == [
            (1, 3),
            (2, 3),
            (3, 0),
        ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reward"]) for line in lines] == [(1, 0.5), (2, 0.75), (3, 1.0)]


def test_a_resumed_run_forgets_what_it_does_again(tmp_path: Path) -> None:
    for run_id in ("one", "other"):
        db = RunDB(tmp_path, run_id)
        db.begin("train", "", {}, None)
        for step in (1, 2, 3):
            db.step(step, [ROW], {"reward": step}, policy_version=f"step-{step}", started_at=0.0)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"run_id": "one", "st')  # its writer was killed
    db = RunDB(tmp_path, "one")
    db.begin("train", "", {"again": True}, None)
    db.rewind(1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run_id"], line["step"]) for line in lines] == [
        ("one", 1),
        ("other", 1),
        ("other", 2),
        ("other", 3),
    ]
    assert db.series("reward") == ([1], [1.0])
    with duckdb.connect(str(db.path), read_only=True) as con:
        runs = con.execute("SELECT run_id, status FROM runs ORDER BY run_id").fetchall()
        rows = con.execute("SELECT run_id, count(*) FROM step_rows GROUP BY ALL ORDER BY ALL").fetchall()
    assert runs == [("one", "running"), ("other", "running")]
    assert rows == [("one", 1), ("other", 3)]


def test_no_database_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundb, "_LAST_WAIT_S", 0.0)
    (tmp_path / "run.duckdb").write_text("no database, but longer than its header would be " * 99)
    with pytest.raises(StoreError, match=r"run\.duckdb cannot be written"):
        RunDB(tmp_path, "run").begin("train", "", {}, None)


def test_the_last_run_while_somebody_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, and in the end named."""
    with pytest.raises(StoreError, match=r"holds no run$"):
        RunDB.last_run(tmp_path)
    RunDB(tmp_path, "run").begin("train", "", {"seed": 1}, None)
    path = str(tmp_path / "run.duckdb")
    code = f"import duckdb, sys; c = duckdb.connect({path!r}); print(1, flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "1\n"
        with monkeypatch.context() as patch:
            patch.setattr(rundb, "_LAST_WAIT_S", 0.0)
            with pytest.raises(StoreError, match=rf"cannot be read: .*PID {writer.pid}"):
                RunDB.last_run(tmp_path)
        threading.Timer(0.3, writer.kill).start()
        assert RunDB.last_run(tmp_path) == "run"
    assert RunDB.recorded(tmp_path) == ("run", "train", {"seed": 1})


def test_what_differs_is_told_by_its_key() -> None:
    then = {"seed": 0, "policy": {"lora": None, "dtype": "float32"}, "gone": 1}
    now = {"seed": 1, "policy": {"lora": {"rank": 4}, "dtype": "float32"}, "new": 2}
    assert differences(then, now) == ["seed: 0, now 1", 'policy.lora: null, now {"rank": 4}']
