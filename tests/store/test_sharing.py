"""Another process reads while a capture runs, and cannot write."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import duckdb
import pytest

from polar_mitm.errors import StoreError
from polar_mitm.store import Recorder, open_reader, share
from polar_mitm.types import Rollout
from tests.store.calls import conversation, python, run

READER = """
import json, sys
from pathlib import Path
import msgspec
from polar_mitm.store import open_reader
with open_reader(Path(sys.argv[1])) as reader:
    print(json.dumps({
        "way": type(reader._source).__name__,
        "calls": msgspec.to_builtins(reader.calls(wire=True)),
        "one": msgspec.to_builtins(reader.call("c0003")),
        "full": reader.sql("SELECT call_id, prompt_token_ids FROM calls_full ORDER BY call_id").to_pylist(),
        "version": reader.schema_version,
    }))
"""

WRITES = [
    "INSERT INTO rewards VALUES ('r1', 'forged', 1, '', '', 0)",
    "DELETE FROM call_log",
    "UPDATE rollout_rows SET incomplete = NULL",
    "DROP TABLE call_rows",
    "SELECT 1; DROP TABLE call_rows",
    "WITH x AS (SELECT 1) INSERT INTO rewards SELECT 'r1', 'forged', 1, '', '', 0",
    "CREATE TABLE memory.main.t AS SELECT 1",
    "ATTACH ':memory:' AS other",
    "SET threads = 1",
    "COPY calls TO '/tmp/never.csv'",
    "CALL pragma_version()",
    "CHECKPOINT",
    "EXPLAIN SELECT 1",
    "",
    "nonsense",
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "it's a store.duckdb"


def live_recorder(path: Path, alarms: list[str] | None = None) -> Recorder:
    recorder = Recorder(path, on_alarm=(alarms if alarms is not None else []).append)
    recorder.open()
    made = conversation(6)
    assert recorder.rollout(Rollout("r1")).result()
    assert all([f.result() for f in [recorder.call(c) for c in made]])
    return recorder


def test_another_process_reads_a_running_capture_and_its_end(store: Path) -> None:
    alarms: list[str] = []
    recorder = live_recorder(store, alarms)
    during = json.loads(run(READER, store))
    assert recorder.call(conversation(7)[6]).result()
    later = json.loads(run(READER, store))
    recorder.close()
    after = json.loads(run(READER, store))
    assert (during.pop("way"), later.pop("way"), after.pop("way")) == ("_Remote", "_Remote", "_File")
    assert later == after and not alarms
    assert [c["prompt_token_ids"] for c in during["calls"]] == [c.prompt_token_ids for c in conversation(6)]
    assert [f["prompt_token_ids"] for f in after["full"]] == [c.prompt_token_ids for c in conversation(7)]
    assert during["one"] == during["calls"][3]
    assert sorted(p.name for p in store.parent.iterdir()) == [store.name]


def test_no_proxy_of_the_environment_sees_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    recorder = live_recorder(store)
    assert json.loads(run(READER, store))["way"] == "_Remote"
    recorder.close()


@pytest.mark.parametrize("running", [True, False])
def test_a_reader_cannot_write(store: Path, running: bool) -> None:
    recorder = live_recorder(store)
    if not running:
        recorder.close()
    with open_reader(store) as reader:
        for query in WRITES:
            with pytest.raises(StoreError):
                reader.sql(query)
        with pytest.raises(StoreError):
            reader.sql("FROM read_text('/etc/hostname')")
        assert len(reader.calls()) == 6 and not reader.rewards()
        assert reader.sql("DESCRIBE calls").num_rows > 20
    recorder.close()


def test_the_server_refuses_what_a_reader_would_not_send(store: Path) -> None:
    """With the token in hand and DuckDB's own client: nothing but SELECT, and nothing without the token."""
    recorder = live_recorder(store)
    with open_reader(store):  # waits until it is served
        live = share.find_live(store)
    assert live and live.uri
    con = share.client()
    assert share.remote_select(con, live, "SELECT count(*) FROM calls").fetchall() == [(6,)]
    for query in WRITES:
        for text in (query, f"USE store;{query}", f"SELECT 1; {query}"):
            if text == "USE store;":
                continue
            with pytest.raises(duckdb.Error):
                con.execute("FROM quack_query(?, ?, token := ?)", [live.uri, text, live.token]).fetchall()
    for query in ("FROM read_text('/etc/hostname')", "SELECT nope FROM calls"):
        with pytest.raises(duckdb.Error):
            share.remote_select(con, live, query).fetchall()
    with pytest.raises(duckdb.Error):
        con.execute(f"ATTACH '{live.uri}' AS r (TOKEN '{live.token}')")
        con.execute("INSERT INTO r.rewards VALUES ('r1', 'forged', 1, '', '', 0)")
    with pytest.raises(duckdb.Error, match="Authentication"):
        share.remote_select(con, share.Live(live.pid, live.uri, "0" * 48), "SELECT 1").fetchall()
    con.close()
    recorder.close()
    with open_reader(store) as reader:
        assert len(reader.calls()) == 6 and not reader.rewards()


def test_only_the_owner_reads_the_token(store: Path) -> None:
    recorder = live_recorder(store)
    with open_reader(store):
        found = share.discovery_path(store)
        assert stat.S_IMODE(found.stat().st_mode) == 0o600
        assert len(json.loads(found.read_text())["token"]) == 48
    recorder.close()
    assert not found.exists()


def test_a_reader_outlives_the_capture(store: Path) -> None:
    recorder = live_recorder(store)
    with open_reader(store) as reader:
        assert len(reader.calls()) == 6
        recorder.close()
        assert len(reader.calls()) == 6
        assert reader.sql("SELECT count(*) AS n FROM calls")["n"][0].as_py() == 6


KILLED = """
import sys
from pathlib import Path
from polar_mitm.store import Recorder
from tests.store.calls import conversation
recorder = Recorder(Path(sys.argv[1]))
recorder.open()
assert all([f.result() for f in [recorder.call(c) for c in conversation(6)]])
print("stored", flush=True)
sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_no_obstacle(store: Path) -> None:
    process = python(KILLED, store)
    assert process.stdout and process.stdout.readline() == "stored\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert share.discovery_path(store).exists() and share.find_live(store) is None
    with open_reader(store) as reader:
        assert reader.calls() == conversation(6)
    recorder = Recorder(store)
    with recorder:
        assert recorder.rescue_path is None
        assert recorder.call(conversation(7)[6]).result()
        with open_reader(store) as reader:
            assert reader.calls() == conversation(7)
    assert not share.discovery_path(store).exists()


def test_who_does_not_share_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_mitm.store.reader._SHARE_WAIT_S", 0.2)
    with Recorder(store, share=False), pytest.raises(StoreError, match=f"locked by process {os.getpid()}"):
        open_reader(store)


def test_without_the_extensions_recording_goes_on(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("polar_mitm.store.reader._SHARE_WAIT_S", 0.2)
    monkeypatch.setattr("importlib.import_module", missing)
    alarms: list[str] = []
    with Recorder(store, on_alarm=alarms.append) as recorder:
        assert recorder.call(conversation(1)[0]).result()
        with pytest.raises(StoreError, match="locked by process"):
            open_reader(store)
    assert len(alarms) == 1 and "duckdb-extension-httpfs is not installed" in alarms[0]


def test_queries_of_readers_do_not_keep_calls_from_being_stored(store: Path) -> None:
    recorder = live_recorder(store)
    hammer = """
import sys
from pathlib import Path
from polar_mitm.store import open_reader
with open_reader(Path(sys.argv[1])) as reader:
    print("reading", flush=True)
    for _ in range(30):
        reader.sql("SELECT count(*) FROM calls_full, range(2000)")
    print(len(reader.calls()), flush=True)
"""
    process = python(hammer, store)
    assert process.stdout and process.stdout.readline() == "reading\n"
    assert all([recorder.call(c).result() for c in conversation(80)[6:]])
    out, _ = process.communicate()
    assert process.returncode == 0 and 6 <= int(out) <= 80
    recorder.close()
    with open_reader(store) as reader:
        assert reader.calls() == conversation(80)
