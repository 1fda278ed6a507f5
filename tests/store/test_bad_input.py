"""Stores with holes, doubles, damage: named and refused, or quarantined; never a traceback, never a guess."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from polar_mitm.errors import StoreError
from polar_mitm.reconstruct import build
from polar_mitm.store import Recorder, StoreReader, open_reader
from polar_mitm.store.columns import each_rollout, rollout_columns
from polar_mitm.store.seal import seal_rollout, verify_seal
from polar_mitm.types import Message, Rollout, TextPart, Wire
from tests.store.calls import call, conversation


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "s.duckdb"
    calls = conversation(5)
    for each in calls:
        body = b'{"messages": "%s"}' % (b"word " * 50 * (each.seq + 1))
        each.wire = Wire("POST", "h", "/p", [("a", "b")], body, 200, [], b"the answer")
        each.upstream_body = body[::-1]
        each.answer = Message("assistant", [TextPart("hi")])
        each.delivered = True
    with Recorder(path, share=False) as recorder:
        recorder.rollout(Rollout("r1", status="completed"))
        assert all(recorder.call(c).result() for c in calls)
    seal_rollout(path, "r1")
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "s.duckdb"))


def damage(path: Path, sql: str) -> None:
    with duckdb.connect(str(path)) as con:
        con.execute(sql)


def everything(reader: StoreReader) -> None:
    """Each way to read a store."""
    rollouts = reader.rollouts()
    for columns, rollout in zip(each_rollout(reader, ["r1"]), rollouts, strict=False):
        list(build(columns, rollout=rollout)[0])
    reader.calls(wire=True)
    assert verify_seal(reader, "r1").ok
    reader.sql("FROM calls")


@pytest.mark.parametrize(
    "sql, told",
    [
        ("DELETE FROM call_rows WHERE call_id = 'c0001'", "call c0002 has no prompt: call c0001, .* is lost"),
        ("INSERT INTO call_rows FROM call_rows WHERE call_id = 'c0001'", "2 records claim to be c0001"),
        ("UPDATE call_rows SET prompt_parent_id = 'c0004' WHERE call_id = 'c0001'", "is lost"),
        ("UPDATE call_rows SET prompt_parent_id = call_id WHERE call_id = 'c0001'", "c0001 .* is lost"),
        (
            "UPDATE call_rows SET completion_token_ids = [] WHERE call_id = 'c0001'",
            "c0001 is shorter",
        ),
        ("UPDATE call_rows SET usage = '{' WHERE call_id = 'c0001'", "record of call c0001 is damaged"),
        ("UPDATE call_rows SET notes = NULL WHERE call_id = 'c0001'", "record of call c0001 is damaged"),
        (
            "UPDATE call_rows SET status = 'paused' WHERE call_id = 'c0001'",
            "c0001 is damaged, or a later version's",
        ),
        (
            "UPDATE call_rows SET lineage = '{\"continuation\": \"mended\"}' WHERE call_id = 'c0001'",
            "c0001 is damaged, or a later version's: Invalid enum value 'mended'",
        ),
    ],
)
def test_calls_that_cannot_be_told_are_named(path: Path, sql: str, told: str) -> None:
    damage(path, sql)
    with open_reader(path) as reader, pytest.raises(StoreError, match=told):
        reader.calls()


@pytest.mark.parametrize(
    "sql, told",
    [
        ("UPDATE call_rows SET body_base_id = 'gone' WHERE call_id = 'c0002'", "c0002 .* 'gone', .* is lost"),
        ("UPDATE call_rows SET body_base_id = 'c0004' WHERE call_id = 'c0001'", "is lost"),
        (
            "UPDATE call_rows SET request_body = 'xx' WHERE call_id = 'c0002'",
            "bodies of call c0002 are damaged",
        ),
        ("UPDATE call_rows SET response_body = '0123456789abc' WHERE call_id = 'c0002'", "of call c0002 are"),
        (
            "UPDATE call_rows SET answer = answer[:20] WHERE call_id = 'c0002'",
            "bodies of call c0002 are damaged",
        ),
        ("UPDATE call_rows SET http = '[]' WHERE call_id = 'c0002'", "bodies of call c0002 are damaged"),
        ("UPDATE call_rows SET pacing = NULL WHERE call_id = 'c0002'", "bodies of call c0002 are damaged"),
    ],
)
def test_bodies_that_cannot_be_told_are_named(path: Path, sql: str, told: str) -> None:
    damage(path, sql)
    with open_reader(path) as reader:
        assert len(reader.calls()) == 5
        with pytest.raises(StoreError, match=told):
            reader.calls(wire=True)


@pytest.mark.parametrize(
    "sql, reasons",
    [
        ("DELETE FROM call_rows WHERE call_id = 'c0001'", {"c0002": "lost_prefix"}),
        (
            "INSERT INTO call_rows FROM call_rows WHERE call_id = 'c0004'",
            {"c0004": "duplicate_call_id"},
        ),
        ("UPDATE call_rows SET status = 'paused' WHERE call_id = 'c0002'", {"c0002": "failed"}),
        ("UPDATE call_rows SET role = 'judge' WHERE call_id = 'c0002'", {"c0002": "failed"}),
        ("UPDATE call_rows SET role = NULL WHERE call_id = 'c0002'", {"c0002": "failed"}),
        ("UPDATE call_rows SET usage = '{' WHERE call_id = 'c0002'", {"c0002": "failed"}),
        ("UPDATE call_rows SET lineage = '{' WHERE call_id = 'c0002'", {"c0002": "failed"}),
        (
            "UPDATE call_rows SET lineage = '{\"continuation\": \"mended\"}' WHERE call_id = 'c0002'",
            {"c0002": "failed"},
        ),
        (
            'UPDATE call_rows SET lineage = \'{"fallback": "x", "newfield": 1}\' WHERE call_id = \'c0002\'',
            {"c0002": "failed"},
        ),
        ("UPDATE call_rows SET lineage = '[1]' WHERE call_id = 'c0002'", {"c0002": "failed"}),
        ("UPDATE call_rows SET lineage = '{' WHERE call_id = 'c0002'", {"c0002": "failed"}),
    ],
)
def test_reconstruction_quarantines_and_goes_on(path: Path, sql: str, reasons: dict[str, str]) -> None:
    damage(path, sql)
    with open_reader(path) as reader:
        trajectories, report = build(rollout_columns(reader, "r1"), rollout=reader.rollouts()[0])
    assert report.adds_up and report.num_quarantined > 0
    assert reasons.items() <= dict(report.quarantined_calls).items()
    assert all(span.call_id not in reasons for t in trajectories for span in t.spans)


def test_a_capture_goes_on_in_a_store_with_holes(path: Path) -> None:
    damage(path, "DELETE FROM call_rows WHERE call_id = 'c0001'; DELETE FROM seals")
    more = call("more", list(range(60)), [1, 2], seq=9, started_at=99.0)
    with Recorder(path, share=False) as recorder:
        assert recorder.call(more).result() and recorder.incomplete("r1") is None
    with open_reader(path) as reader:
        assert reader.prompt("more") == more.prompt_token_ids


def flip(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def blank(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))


@pytest.mark.parametrize("harm", [flip, cut, blank])
def test_a_damaged_file_is_an_error_that_names_it(
    path: Path, harm: Callable[[bytearray, random.Random], None]
) -> None:
    """Where the damage hits nothing that is read, all of it is as it was."""
    original, chance, refused = path.read_bytes(), random.Random(0), 0
    with open_reader(path) as reader:
        before = reader.calls(wire=True)
    for _ in range(25):
        data = bytearray(original)
        harm(data, chance)
        path.write_bytes(data)
        try:
            with open_reader(path) as reader:
                everything(reader)
                assert reader.calls(wire=True) == before
        except StoreError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 0


def test_a_rollout_whose_own_record_is_lost_is_listed_and_quarantined(path: Path) -> None:
    damage(path, "DELETE FROM rollout_rows")
    with open_reader(path) as reader:
        (rollout,) = reader.rollouts()
        assert (rollout.rollout_id, rollout.incomplete) == ("r1", "its own record is missing")
        _, report = build(rollout_columns(reader, "r1"), rollout=rollout)
    assert (report.sampled, report.trained) == (15, 0) and set(report.quarantined) == {"incomplete_rollout"}


def test_a_rollout_of_which_only_the_seal_is_left_is_listed(path: Path) -> None:
    damage(path, "DELETE FROM rollout_rows")
    damage(path, "DELETE FROM call_rows")
    with open_reader(path) as reader:
        assert [(r.rollout_id, bool(r.incomplete)) for r in reader.rollouts()] == [("r1", True)]


def test_a_rollout_that_two_records_claim_to_be_is_listed_once_and_quarantined(path: Path) -> None:
    damage(path, "INSERT INTO rollout_rows SELECT * REPLACE ('failed' AS status) FROM rollout_rows")
    with open_reader(path) as reader:
        (rollout,) = reader.rollouts()
        assert (rollout.rollout_id, rollout.incomplete) == ("r1", "two records claim to be this rollout")
        _, report = build(rollout_columns(reader, "r1"), rollout=rollout)
    assert (report.sampled, report.trained) == (15, 0) and set(report.quarantined) == {"incomplete_rollout"}


@pytest.mark.parametrize("column", ["prompt_suffix", "completion_token_ids", "behaviour_logprobs"])
@pytest.mark.parametrize("value", ["NULL", "list_concat({}[:-2], [NULL])"])
def test_a_null_is_no_token(path: Path, column: str, value: str) -> None:
    damage(path, f"UPDATE call_rows SET {column} = {value.format(column)} WHERE call_id = 'c0004'")
    with open_reader(path) as reader:
        _, report = build(rollout_columns(reader, "r1"))
        assert (report.trained, [call_id for call_id, _ in report.quarantined_calls]) == (12, ["c0004"])
        with pytest.raises(StoreError, match="call c0004 lacks some of its tokens"):
            reader.calls()
        readable, lost = reader.readable_calls("r1", wire=True)
        assert [c.call_id for c in readable] == ["c0000", "c0001", "c0002", "c0003"]
        assert lost == {"c0004": "call c0004 lacks some of its tokens"}


def test_a_parent_without_a_length_is_told(path: Path) -> None:
    damage(path, "UPDATE call_rows SET prompt_shared = NULL WHERE call_id = 'c0004'")
    with open_reader(path) as reader:
        assert reader.readable_calls("r1")[1] == {"c0004": "call c0004 lacks some of its tokens"}


def test_the_only_call_of_a_rollout_stands_on_one_that_is_lost(path: Path) -> None:
    damage(path, "DELETE FROM call_rows WHERE call_id <> 'c0001'")
    with open_reader(path) as reader:
        _, report = build(rollout_columns(reader, "r1"))
    assert report.quarantined == {"lost_prefix": 3}


def test_what_can_be_read_is_read(path: Path) -> None:
    damage(path, "UPDATE call_rows SET usage = '{' WHERE call_id = 'c0000'")
    damage(path, "DELETE FROM call_rows WHERE call_id = 'c0002'")
    damage(path, "UPDATE call_rows SET pacing = NULL WHERE call_id = 'c0001'")
    with open_reader(path) as reader:
        readable, lost = reader.readable_calls("r1", wire=True)
        assert [c.call_id for c in readable] == ["c0001"] and len(readable[0].prompt_token_ids) == 60
    assert sorted(lost) == ["c0000", "c0001", "c0003", "c0004"]
    assert "bodies of call c0001 are damaged" in lost["c0001"] and "c0002, on top" in lost["c0003"]
