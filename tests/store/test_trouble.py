"""Whatever goes wrong: callers get False, never an exception or a wait; operator told, rollout marked."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import duckdb
import pytest

from polar_mitm.errors import StoreError
from polar_mitm.store import Recorder, open_reader
from polar_mitm.store.reader import LOST_RECORD
from polar_mitm.types import EgressEvent, Reward, Rollout, Wire
from tests.store.calls import call, conversation, python, run

HOLDER = """
import duckdb, sys
con = duckdb.connect(sys.argv[1])
print("locked", flush=True)
sys.stdin.readline()
"""


def rescue_of(path: Path, folder: Path | None = None) -> Path:
    return (folder or path.parent) / f"{path.stem}.rescue-{os.getpid()}.duckdb"


def test_a_locked_store_is_rescued_next_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_mitm.store.recorder._LOCK_WAIT_S", 0.1)
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False):
        pass
    holder = python(HOLDER, path)
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    alarms: list[str] = []
    try:
        with Recorder(path, on_alarm=alarms.append) as recorder:
            assert recorder.rescue_path == recorder.path == rescue_of(path)
            assert recorder.rollout(Rollout("r1", harness="h")).result()
            assert recorder.call(call("a", [1], [2])).result()
            reason = recorder.incomplete("r1")
        with pytest.raises(StoreError, match=f"locked by process {holder.pid}"):
            open_reader(path)
    finally:
        holder.communicate("\n")
    assert (
        len(alarms) == 1
        and f"locked by process {holder.pid}" in alarms[0]
        and str(rescue_of(path)) in alarms[0]
    )
    assert reason and str(rescue_of(path)) in reason
    with open_reader(rescue_of(path)) as reader:
        assert [c.call_id for c in reader.calls()] == ["a"]
        assert [(r.harness, r.incomplete) for r in reader.rollouts()] == [("h", reason)]


def test_a_lock_that_is_let_go_in_time_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False):
        pass
    holder = python(HOLDER, path)
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    timer = threading.Timer(0.2, holder.communicate, ["\n"])
    timer.start()
    with Recorder(path, share=False) as recorder:
        assert recorder.rescue_path is None
        assert recorder.call(call("a")).result()
    timer.join()


def test_two_recorders_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_mitm.store.recorder._LOCK_WAIT_S", 0.1)
    path = tmp_path / "s.duckdb"
    alarms: list[str] = []
    with Recorder(path) as first, Recorder(path, on_alarm=alarms.append) as second:
        assert first.call(call("a")).result() and second.call(call("b")).result()
        assert second.path == rescue_of(path)
    assert f"locked by process {os.getpid()}" in alarms[0]
    with open_reader(path) as reader:
        assert [c.call_id for c in reader.calls()] == ["a"]


def test_a_place_that_cannot_be_written_is_rescued_to_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = Path("/proc/none/s.duckdb")
    alarms: list[str] = []
    with Recorder(path, on_alarm=alarms.append) as recorder:
        assert recorder.rescue_path == rescue_of(path, tmp_path)
        assert recorder.call(call("a")).result()
        assert recorder.incomplete("r1") and recorder.incomplete("any")
    assert len(alarms) == 1
    with open_reader(rescue_of(path, tmp_path)) as reader:
        (rollout,) = reader.rollouts()
    assert rollout.incomplete and "/proc/none/s.duckdb cannot be written" in rollout.incomplete


def test_no_place_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/neither")
    alarms: list[str] = []
    with Recorder(Path("/proc/none/s.duckdb"), on_alarm=alarms.append) as recorder:
        assert recorder.rescue_path is None
        assert not recorder.call(call("a")).result()
        assert not recorder.rollout(Rollout("r1")).result()
        assert not recorder.reward(Reward("r1", "x", 1.0)).result()
        recorder.egress(EgressEvent("r1", 0.0, "refused", "dns", "x"))
        assert recorder.incomplete("r1") and "nothing is recorded" in (recorder.incomplete("other") or "")
    assert "nothing is recorded" in alarms[0]


READ_ONLY = """
import json, os, sys
from pathlib import Path
from polar_mitm.store import Recorder
from tests.store.calls import call
folder, temp = Path(sys.argv[1]), Path(sys.argv[2])
os.environ["TMPDIR"] = str(temp)
with Recorder(temp / "warm.duckdb") as recorder:  # loads what it loads while it still may
    assert recorder.call(call("w")).result()
if os.geteuid() == 0:
    os.seteuid(65534)  # permissions do not bind root
alarms = []
with Recorder(folder / "s.duckdb", on_alarm=alarms.append) as recorder:
    stored = recorder.call(call("a", [1], [2])).result()
    print(json.dumps([stored, str(recorder.rescue_path), recorder.incomplete("r1"), alarms]))
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_read_only_folder_or_file(existing: bool) -> None:
    work = Path(tempfile.mkdtemp())
    try:
        work.chmod(0o755)
        folder, temp = work / "ro", work / "temp"
        folder.mkdir()
        temp.mkdir()
        temp.chmod(0o777)
        if existing:
            with Recorder(folder / "s.duckdb", share=False):
                pass
            (folder / "s.duckdb").chmod(0o444)
        folder.chmod(0o555)
        stored, rescue, reason, alarms = json.loads(run(READ_ONLY, folder, temp))
        assert stored and Path(rescue).parent == temp and rescue in reason
        assert len(alarms) == 1 and "s.duckdb cannot be written" in alarms[0]
        with open_reader(Path(rescue)) as reader:
            assert [c.call_id for c in reader.calls()] == ["a"]
    finally:
        (work / "ro").chmod(0o755)
        shutil.rmtree(work)


FULL_DISK = """
import json, os, resource, sys, time
from pathlib import Path
from polar_mitm.store import Recorder
from polar_mitm.types import Rollout, Wire
from tests.store.calls import call
path = Path(sys.argv[1])
def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
def made(i, r):
    return call(f"c{i:03}", range(i), [i], rollout_id=r, seq=i, wire=Wire(request_body=os.urandom(50_000)))
alarms = []
with Recorder(path, on_alarm=alarms.append) as recorder:
    assert all([recorder.rollout(Rollout(r, status="completed")).result() for r in ("full", "fine")])
    limit(1_000_000)
    before = [recorder.call(made(i, "full")).result() for i in range(40)]
    limit(-1)
    after = [recorder.call(made(i, "fine")).result() for i in range(40, 60)]
    again = [recorder.call(made(i, "full")).result() for i in range(60, 65)]
    marks = [recorder.incomplete("full"), recorder.incomplete("fine")]
    print(json.dumps([before, after, again, *marks, alarms]))
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """A file that may not grow fails as a full disk does; when there is room again, recording goes on."""
    path = tmp_path / "s.duckdb"
    before, after, again, full, fine, alarms = json.loads(run(FULL_DISK, path))
    stored = before.index(False)
    assert 0 < stored < 30 and not any(before[stored:])
    assert all(after) and all(again)
    assert full and fine is None
    assert len(alarms) == 1 and "cannot write to" in alarms[0]
    with open_reader(path) as reader:
        kept = [c.call_id for c in reader.calls()]
        assert sorted(kept) == [f"c{i:03}" for i in [*range(stored), *range(40, 65)]]
        assert all(len(c.prompt_token_ids) == c.seq for c in reader.calls())
        marks = {r.rollout_id: r.incomplete for r in reader.rollouts()}
    assert marks == {"full": full, "fine": None}


CHECKPOINT_FAILS = """
import json, os, resource, sys
from pathlib import Path
from polar_mitm.store import Recorder, writer
from polar_mitm.types import Wire
from tests.store.calls import call
def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
writer._MAX_WAL_BYTES = 400_000
alarms = []
with Recorder(Path(sys.argv[1]), on_alarm=alarms.append) as recorder:
    limit(300_000)
    stored = []
    for i in range(60):
        wire = Wire(request_body=os.urandom(20_000))
        stored.append(recorder.call(call(f"c{i:02}", range(i), [i], seq=i, wire=wire)).result())
        if i == 30:
            limit(-1)
    print(json.dumps([stored, alarms]))
"""


def test_a_database_that_fails_for_good_is_opened_again(tmp_path: Path) -> None:
    """A failed checkpoint makes DuckDB refuse everything on its connections until the file is opened anew."""
    path = tmp_path / "s.duckdb"
    stored, alarms = json.loads(run(CHECKPOINT_FAILS, path))
    assert not all(stored) and all(stored[-10:]) and alarms
    with open_reader(path) as reader:
        found = reader.calls()
        assert [c.call_id for c in found] == [f"c{i:02}" for i, ok in enumerate(stored) if ok]
        assert all(c.prompt_token_ids == list(range(c.seq)) for c in found)
        assert reader.rollouts()[0].incomplete


def test_a_deleted_store_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    alarms: list[str] = []
    with Recorder(path, on_alarm=alarms.append, share=False) as recorder:
        assert recorder.call(call("a", rollout_id="early")).result()
        path.unlink()
        assert not recorder.call(call("b", rollout_id="late")).result()
        assert recorder.incomplete("early") and recorder.incomplete("late")
        assert recorder.call(call("c", rollout_id="next")).result()
    assert "deleted or replaced" in alarms[0]
    with open_reader(path) as reader:
        assert [c.call_id for c in reader.calls()] == ["c"]
        marks = {r.rollout_id: r.incomplete for r in reader.rollouts()}
        assert marks.pop("next") == LOST_RECORD and all(marks.values()) and set(marks) == {"early", "late"}


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        assert recorder.rescue_path is None
        assert recorder.call(call("a")).result()


def test_records_that_cannot_be_stored_harm_no_others(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    alarms: list[str] = []
    good = conversation(12)
    bad = [
        call("id", [2**31], rollout_id="bad1"),
        call("float", [1.5], rollout_id="bad2"),  # type: ignore[list-item]
        call("none", [1], [1], rollout_id="bad3", behaviour_logprobs=[None]),
        call("huge", [1], [1], rollout_id="bad8", behaviour_logprobs=[-1e39]),
        call("seq", [1], rollout_id="bad4", seq=2**70),
        call("flag", [1], rollout_id="bad5", stream="yes"),
        call("sizes", [1], rollout_id="bad6", wire=Wire(chunk_at_ms=["x"])),  # type: ignore[list-item]
    ]
    rollout = Rollout("bad7", sample_index=2**40)
    mixed = [*good[:4], *bad[:3], *good[4:8], *bad[3:], *good[8:]]
    with Recorder(path, on_alarm=alarms.append, share=False) as recorder:
        futures = {c.call_id: recorder.call(c) for c in mixed}
        futures["rollout"] = recorder.rollout(rollout)
        results = {name: f.result() for name, f in futures.items()}
        assert recorder.incomplete("r1") is None
        assert all(recorder.incomplete(f"bad{i}") for i in range(1, 6))
        # A later word on the rollout, from somebody who has not heard, does not make it whole.
        assert recorder.call(call("next", rollout_id="r2")).result()
        assert recorder.rollout(Rollout("bad1", status="completed")).result()
        assert recorder.incomplete("bad7")
    assert [name for name, stored in results.items() if not stored] == [
        "id", "float", "none", "huge", "seq", "flag", "rollout",
    ]  # fmt: skip
    assert alarms
    with open_reader(path) as reader:
        assert reader.calls("r1") == good
        marked = {r.rollout_id: r.status for r in reader.rollouts() if r.incomplete}
        assert set(marked) >= {"bad1", "bad4", "bad7"} and marked["bad1"] == "completed"


def test_a_value_that_its_column_cannot_hold_hides_no_other(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        assert recorder.call(call("a", [1], [2])).result()
    odd = '{"call_id": "odd", "rollout_id": "r1", "seq": 1e99, "behaviour_logprobs": [1e39]}'
    with duckdb.connect(str(path)) as con:
        con.execute("INSERT INTO call_log VALUES (?)", [odd])
        found = con.execute("SELECT call_id, seq FROM stored_calls ORDER BY call_id").fetchall()
    assert found == [("a", 0), ("odd", None)]


def test_a_call_is_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    alarms: list[str] = []
    with Recorder(path, on_alarm=alarms.append, share=False) as recorder:
        assert recorder.call(call("a", [1], [2])).result()
        assert not recorder.call(call("a", [1], [3])).result()
        assert recorder.incomplete("r1") is None
    assert "call a was recorded before" in alarms[0]
    with open_reader(path) as reader:
        assert [c.completion_token_ids for c in reader.calls()] == [[2]]


def test_a_full_queue_refuses_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.duckdb"
    alarms: list[str] = []
    go = threading.Event()
    with Recorder(path, on_alarm=alarms.append, share=False, max_pending=5) as recorder:
        commit = recorder._hold.writer.commit
        monkeypatch.setattr(recorder._hold.writer, "commit", lambda batch: (go.wait(60), commit(batch)))
        monkeypatch.setattr(
            recorder, "_pack", lambda item, into, pack=recorder._pack: (go.wait(60), pack(item, into))
        )
        futures = [recorder.call(call(f"c{i:02}", rollout_id=f"r{i}")) for i in range(30)]
        refused = [i for i, f in enumerate(futures) if f.done()]
        assert 30 - 5 - 1 > len(refused) - 5 > 10 and not any(futures[i].result() for i in refused)
        go.set()
        assert all([f.result() for i, f in enumerate(futures) if i not in refused])
        assert recorder.call(call("later", rollout_id="r30")).result()
        assert [i for i in range(31) if recorder.incomplete(f"r{i}")] == refused
    assert len(alarms) == 1 and "cannot keep up" in alarms[0]
    with open_reader(path) as reader:
        told = {r.rollout_id for r in reader.rollouts() if r.incomplete != LOST_RECORD}
        assert told == {f"r{i}" for i in refused}


def test_before_opening_and_after_closing(tmp_path: Path) -> None:
    alarms: list[str] = []
    recorder = Recorder(tmp_path / "s.duckdb", on_alarm=alarms.append, share=False)
    assert not recorder.call(call("a")).result()
    recorder.open()
    recorder.close()
    recorder.close()
    assert not recorder.call(call("b", rollout_id="r2")).result()
    recorder.egress(EgressEvent("r2", 0.0, "refused", "dns", "x"))
    assert recorder.incomplete("r2") and len(alarms) == 1


def test_an_alarm_that_fails_stops_nothing(tmp_path: Path) -> None:
    def broken(text: str) -> None:
        raise RuntimeError(text)

    with Recorder(tmp_path / "s.duckdb", on_alarm=broken, share=False) as recorder:
        assert not recorder.call(call("a", [-(2**40)])).result()
        assert recorder.call(call("b", [1])).result()


def test_a_bug_of_ours_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Recorder(tmp_path / "s.duckdb", share=False, on_alarm=lambda text: None) as recorder:
        with monkeypatch.context() as patch:
            patch.setattr("polar_mitm.store.packing.credentials", lambda wire: 1 / 0)
            assert not recorder.call(call("a")).result(20)
        with monkeypatch.context() as patch:
            patch.setattr(recorder._hold.writer, "commit", lambda batch: 1 / 0)
            assert not recorder.call(call("b")).result(20)
        assert recorder.call(call("c")).result(20)


def test_a_caller_who_gave_up_does_not_stop_the_record(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        assert not recorder.call(call("a")).cancel()
    with open_reader(path) as reader:
        assert [c.call_id for c in reader.calls()] == ["a"]


def test_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    results: list[bool] = []

    def work(name: str) -> None:
        with_names = conversation(20)
        for c in with_names:
            c.call_id, c.rollout_id = name + c.call_id, name
            results.append(recorder.call(c).result())

    with Recorder(path, share=False) as recorder:
        threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(results) == 160 and all(results)
    with open_reader(path) as reader:
        for i in range(8):
            assert [c.prompt_token_ids for c in reader.calls(f"t{i}")] == [
                c.prompt_token_ids for c in conversation(20)
            ]
