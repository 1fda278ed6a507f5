"""Migrations, and files that are no store."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

from polar_mitm.errors import StoreError
from polar_mitm.store import Recorder, open_reader, schema
from polar_mitm.store.columns import rollout_columns
from polar_mitm.store.schema import Migration
from tests.store.calls import call

OLD = Migration(1, "old", "CREATE TABLE t (a INTEGER)")
STEPS = [
    OLD,
    Migration(2, "b", "ALTER TABLE t ADD COLUMN b INTEGER; UPDATE t SET b = a + 1"),
    Migration(3, "c", "CREATE VIEW v AS FROM t"),
]


def older_store(path: Path) -> None:
    with schema.connect(path) as con:
        schema.migrate(con, [OLD])
        con.execute("INSERT INTO t VALUES (41)")


def test_an_older_store_is_brought_forward(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    older_store(path)
    with schema.connect(path) as con:
        assert schema.check_version(con, STEPS) == 1
        schema.migrate(con, STEPS)
        assert con.execute("FROM v").fetchall() == [(41, 42)]
        assert con.execute("SELECT version FROM schema_migrations ORDER BY 1").fetchall() == [
            (1,),
            (2,),
            (3,),
        ]
        schema.migrate(con, STEPS)  # nothing left to do
        assert con.execute("SELECT count(*) FROM schema_migrations").fetchone() == (3,)


def test_a_step_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    older_store(path)
    with schema.connect(path) as con:
        with pytest.raises(StoreError, match=r"s\.duckdb cannot be migrated from schema 1"):
            schema.migrate(con, [*STEPS, Migration(4, "bad", "CREATE TABLE u AS FROM nowhere")])
        assert schema.version_of(con) == 1
        assert con.execute("FROM t").fetchall() == [(41,)]


def test_steps_are_read_from_numbered_files(tmp_path: Path) -> None:
    (tmp_path / "0002_more.sql").write_text("CREATE TABLE b (x INTEGER)")
    (tmp_path / "0001_init.sql").write_text("CREATE TABLE a (x INTEGER)")
    assert [(m.version, m.name) for m in schema.migrations(tmp_path)] == [(1, "init"), (2, "more")]
    assert [m.version for m in schema.migrations()] == list(range(1, len(schema.migrations()) + 1))


def test_recorder_and_reader_bring_an_older_store_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        recorder.call(call("c"))
    current = schema.migrations()
    newer = [*current, Migration(len(current) + 1, "next", "CREATE VIEW ids AS SELECT call_id FROM calls")]
    monkeypatch.setattr(schema, "migrations", lambda: newer)
    with open_reader(path) as reader:
        assert reader.schema_version == len(newer)
        assert reader.sql("FROM ids").to_pylist() == [{"call_id": "c"}]
    with Recorder(path, share=False) as recorder:
        assert recorder.call(call("d")).result()


def test_what_the_first_schema_held_is_read_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    names = (
        "rollout_id, seq, dialect, route, status, role, model_requested, model_served, stream, delivered, "
        "sampling_requested, sampling, notes, usage, started_at, num_prompt"
    )
    values = "'r1', 0, 'd', 'r', 'ok', 'main', 'm', 'm', true, true, '{}', '{}', '[]', '{}', 1.5, 2"
    lists = "prompt_suffix, completion_token_ids, behaviour_logprobs"
    with schema.connect(path) as con:
        schema.migrate(con, schema.migrations()[:1])
        con.execute("INSERT INTO rollout_rows (rollout_id, command, sample_index) VALUES ('r1', '[]', 0)")
        for into, tokens in (("call_rows", "'a', [1, 2], [3], [-0.5]"), ("call_log", "'b', [], [], []")):
            con.execute(f"INSERT INTO {into} (call_id, {lists}, {names}) VALUES ({tokens}, {values})")
    with open_reader(path) as reader:
        assert reader.schema_version == schema.migrations()[-1].version
        one, other = reader.calls()
        assert (one.call_id, one.prompt_token_ids, one.completion_token_ids) == ("a", [1, 2], [3])
        assert (one.continuation, one.fallback, one.edits, one.tokenizer) == ("none", None, [], "")
        assert other.call_id == "b" and other.behaviour_logprobs == []
        (rollout,) = reader.rollouts()
        assert (rollout.keep_reasoning, rollout.forked_from) == ("template", None)
        assert list(rollout_columns(reader, "r1").continuation) == ["none", "none"]


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with schema.connect(path) as con:
        schema.migrate(con)
        con.execute("INSERT INTO schema_migrations VALUES (9999, 0)")
    for use in (lambda: Recorder(path).open(), lambda: open_reader(path)):
        with pytest.raises(StoreError, match="schema 9999, newer"):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.duckdb"]


def test_files_that_are_no_store_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.duckdb"
    text.write_text("not a database " * 1000)
    foreign = tmp_path / "foreign.duckdb"
    with duckdb.connect(str(foreign)) as con:
        con.execute("CREATE TABLE mine AS SELECT 42")
    before = {p: p.read_bytes() for p in (text, foreign)}
    for path, reason in ((text, "not a DuckDB file"), (foreign, "not a polar-mitm store")):
        for use in (lambda p: Recorder(p).open(), open_reader):
            with pytest.raises(StoreError, match=reason):
                use(path)
    assert {p: p.read_bytes() for p in before} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.duckdb", "text.duckdb"]


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        open_reader(tmp_path / "none.duckdb")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_reader(tmp_path)
