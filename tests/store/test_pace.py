"""When commits begin: not too often, and not later than somebody has reason to wait for."""

from __future__ import annotations

from pathlib import Path

from polar_mitm.store import Recorder, open_reader
from tests.store.calls import call

NEVER_S, DEADLINE_S = 3600.0, 30.0


def test_what_waits_for_others_is_stored_when_none_come(tmp_path: Path) -> None:
    with Recorder(tmp_path / "s.duckdb", flush_interval_s=NEVER_S, share=False) as recorder:
        assert recorder.call(call("c0", [1], [2])).result(DEADLINE_S)
        for turn in range(1, 4):
            waiting = [recorder.call(call(f"c{turn}{n}", [1], [2])) for n in range(3)]
            recorder.flush()
            assert all(future.result(DEADLINE_S) for future in waiting)


def test_closing_stores_what_waits_for_others(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with Recorder(path, flush_interval_s=NEVER_S, share=False) as recorder:
        assert recorder.call(call("c0", [1], [2])).result(DEADLINE_S)
        waiting = recorder.call(call("c1", [1], [2]))
    assert waiting.result(0)
    with open_reader(path) as reader:
        assert [c.call_id for c in reader.calls()] == ["c0", "c1"]
