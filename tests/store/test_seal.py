"""A seal holds while nothing changes, and names the first record that did."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import pytest

from polar_mitm.errors import StoreError
from polar_mitm.store import Recorder, open_reader
from polar_mitm.store.seal import SealCheck, seal_rollout, seals, verify_seal
from polar_mitm.types import EgressEvent, Message, ModelCall, Reward, Rollout, TextPart, Usage, Wire
from tests.store.calls import call, conversation


def record(path: Path) -> Path:
    with Recorder(path, share=False) as recorder:
        fill(recorder)
    return path


def fill(recorder: Recorder) -> None:
    calls = conversation(3)
    for each in calls:
        each.wire = Wire("POST", "h", "/p", [("a", "b")], b'{"ask": "me"}', 200, [], b"the answer")
        each.answer = Message("assistant", [TextPart("hi")])
        each.behaviour_logprobs = [-0.0, float("nan"), -0.5]
    other = call("other", [1], [2], rollout_id="r2")
    done = [recorder.rollout(Rollout("r1", status="completed")), recorder.rollout(Rollout("r2"))]
    done += [recorder.call(c) for c in [*calls, other]]
    done.append(recorder.reward(Reward("r1", "tests", 1.0, at=5.0)))
    recorder.egress(EgressEvent("r1", 1.0, "refused", "dns", "x.org"))
    assert all(each.result(30) for each in done)


def verified(path: Path, expected: str | None = None) -> SealCheck:
    with open_reader(path) as reader:
        return verify_seal(reader, "r1", expected)


def change(path: Path, sql: str) -> None:
    with duckdb.connect(str(path)) as con:
        assert con.execute(sql).fetchone() != (0,), "the damage was none"


def test_a_seal_holds(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb")
    assert str(verified(path).fault) == "it was never sealed"
    seal = seal_rollout(path, "r1")
    assert seal.num_records == 6  # the rollout, three calls, a reward, an event
    check = verified(path, expected=seal.digest)
    assert check.ok and check.seal == seal
    change(path, "UPDATE call_rows SET error = 'x' WHERE rollout_id = 'r2'")
    with Recorder(path, share=False) as recorder:  # other rollouts go on, and the file is packed again
        assert recorder.call(call("more", [1, 2], [3], rollout_id="r2")).result()
    assert verified(path).ok
    with open_reader(path) as reader:
        assert seals(reader) == [seal]


def test_a_seal_does_not_depend_on_where_a_call_is_stored(tmp_path: Path) -> None:
    path, logged = tmp_path / "s.duckdb", tmp_path / "logged.duckdb"
    with Recorder(path, share=False) as recorder:
        fill(recorder)
        for end in ("", ".wal"):  # as a killed capture leaves it: calls in the log
            shutil.copy(f"{path}{end}", f"{logged}{end}")
    with open_reader(logged) as reader:
        assert reader.sql("SELECT count(*) AS n FROM call_log")["n"][0].as_py() == 4
    assert seal_rollout(path, "r1").digest == seal_rollout(logged, "r1").digest
    with Recorder(logged, share=False):
        pass  # moves them to their table
    with open_reader(logged) as reader:
        assert reader.sql("SELECT count(*) AS n FROM call_log")["n"][0].as_py() == 0
    assert verified(logged).ok


def test_what_a_seal_is_does_not_change_unnoticed(tmp_path: Path) -> None:
    """Version 1 of the digest: where this fails, old seals break, and a new version is needed."""
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        recorder.rollout(Rollout("r1", status="completed", started_at=1.0))
        assert recorder.call(
            ModelCall("c", "r1", 0, "d", "r", "ok", usage=Usage(1, 1), prompt_token_ids=[1], started_at=1.0,
                      completion_token_ids=[2], behaviour_logprobs=[-0.5])
        ).result()  # fmt: skip
    digest = "5dac93a4c085710a37ebd9d584c713964686363e890981a90a76c1dc18465051"
    assert seal_rollout(path, "r1").digest == digest
    with open_reader(path) as reader:
        sealed = set(" ".join(seal_columns()).split())
        for table in ("rollout_rows", "stored_calls", "rewards", "egress"):
            assert set(reader.sql(f"FROM {table} LIMIT 0").column_names) <= sealed


def seal_columns() -> list[str]:
    from polar_mitm.store import seal

    return [seal._ROLLOUT, seal._CALL, seal._REWARD, seal._EGRESS]


@pytest.mark.parametrize(
    "damage, told",
    [
        ("UPDATE rollout_rows SET exit_code = 0 WHERE rollout_id = 'r1'", "rollout r1 was changed"),
        (
            "UPDATE call_rows SET completion_token_ids = [1001, 7, 3001] WHERE call_id = 'c0001'",
            "call c0001 was changed",
        ),
        ("UPDATE call_rows SET behaviour_logprobs = [0, 0, -0.25] WHERE call_id = 'c0001'", "call c0001 was"),
        (
            "UPDATE call_rows SET prompt_suffix = prompt_suffix || [1] WHERE call_id = 'c0002'",
            "call c0002 was",
        ),
        (
            "UPDATE call_rows SET response_body = request_body WHERE call_id = 'c0000'",
            "call c0000 was changed",
        ),
        ("UPDATE call_rows SET answer = NULL WHERE call_id = 'c0002'", "call c0002 was changed"),
        ("UPDATE call_rows SET seq = 9 WHERE call_id = 'c0000'", "call c0000 was changed"),
        ("DELETE FROM call_rows WHERE call_id = 'c0001'", "call c0001 was removed"),
        ("UPDATE call_rows SET call_id = 'c0001x' WHERE call_id = 'c0001'", "call c0001 was removed"),
        ("INSERT INTO call_rows FROM call_rows WHERE call_id = 'c0001'", "call c0001 was"),
        ("UPDATE call_rows SET rollout_id = 'r1' WHERE rollout_id = 'r2'", "call other was added"),
        ("UPDATE rewards SET value = 2", "reward tests was changed"),
        ("INSERT INTO rewards FROM rewards", "reward tests was added"),
        ("DELETE FROM rewards", "reward tests was removed"),
        ("DELETE FROM egress", "egress x.org was removed"),
        ("DELETE FROM rollout_rows WHERE rollout_id = 'r1'", "rollout r1 was removed"),
        ("UPDATE seals SET digest = md5(digest) WHERE position = 3", "the seal of call c0002 was"),
        ("UPDATE seals SET chain = md5(chain) WHERE position = 3", "the seal of call c0002 was changed"),
        ("DELETE FROM seals WHERE position = 6", "the end of the record was added"),
        ("DELETE FROM seals WHERE position = 2", "the seal of call c0002 was changed"),
    ],
)
def test_the_first_record_that_is_not_as_it_was_is_named(tmp_path: Path, damage: str, told: str) -> None:
    path = record(tmp_path / "s.duckdb")
    seal_rollout(path, "r1")
    change(path, damage)
    check = verified(path)
    assert not check.ok and str(check.fault).startswith(told)


def test_a_null_does_not_pass_for_a_number(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb")
    logprobs = "UPDATE call_rows SET behaviour_logprobs = [-0.5, -0.5, {}] WHERE call_id = 'c0001'"
    change(path, logprobs.format(-1.0))
    seal_rollout(path, "r1")
    assert verified(path).ok
    change(path, logprobs.format("NULL"))
    assert str(verified(path).fault) == "call c0001 was changed"


def test_a_new_seal_does_not_pass_for_the_old_one(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb")
    digest = seal_rollout(path, "r1").digest
    change(path, "UPDATE rewards SET value = 2")
    change(path, "DELETE FROM seals")
    seal_rollout(path, "r1")
    assert verified(path).ok
    assert str(verified(path, expected=digest).fault).startswith("it was sealed again")


def test_what_cannot_be_sealed(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb")
    with pytest.raises(StoreError, match="has no rollout nobody"):
        seal_rollout(path, "nobody")
    with pytest.raises(StoreError, match="there is no store"):
        seal_rollout(tmp_path / "none.duckdb", "r1")
    assert not (tmp_path / "none.duckdb").exists()
    with Recorder(path), pytest.raises(StoreError, match=r"process \d+ records into .*s\.duckdb"):
        seal_rollout(path, "r1")
    seal_rollout(path, "r1")
    with pytest.raises(StoreError, match="sealed already"):
        seal_rollout(path, "r1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.duckdb"]


def test_a_rollout_that_a_killed_capture_left_is_sealed_as_interrupted(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb")
    seal_rollout(path, "r2")
    with Recorder(path, share=False):
        pass
    with open_reader(path) as reader:
        assert verify_seal(reader, "r2").ok
        assert [r.status for r in reader.rollouts()].count("interrupted") == 1


def test_nothing_is_added_to_a_sealed_rollout(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb")
    seal_rollout(path, "r1")
    alarms: list[str] = []
    with Recorder(path, on_alarm=alarms.append) as recorder:
        late = [
            recorder.call(call("late", [1], [2])),
            recorder.rollout(Rollout("r1", status="failed")),
            recorder.reward(Reward("r1", "more", 1.0)),
        ]
        recorder.egress(EgressEvent("r1", 9.0, "refused", "dns", "y.org"))
        other = recorder.call(call("fine", [1], [2], rollout_id="r3"))
        assert not any(each.result() for each in late) and other.result()
        assert "is sealed" in (recorder.incomplete("r1") or "")
        assert recorder.incomplete("r3") is None
    assert alarms == ["rollout r1 is sealed, and a record that came for it is not kept"]
    assert verified(path).ok


def test_a_seal_is_checked_while_a_capture_writes(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb")
    digest = seal_rollout(path, "r1").digest
    with Recorder(path) as recorder:
        assert recorder.call(call("more", [1, 2], [3], rollout_id="r2")).result()
        assert verified(path, expected=digest).ok
