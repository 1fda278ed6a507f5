"""A snapshot's id is its rows': the same anywhere, another one for any other token, reward or row."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import duckdb
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.store import open_reader
from polar_mitm_trainer.data import DataError, Snapshot, resolve_query, select, verify
from polar_mitm_trainer.snapshot import Row, digest_of
from tests.trainer.stores import Recorded, groups, reconstruct, record, rollout

QUERY = resolve_query("all")


def taken(path: Path, recorded: list[Recorded]) -> Snapshot:
    with open_reader(record(path, recorded)) as reader:
        return select(reader, QUERY)


def change(path: Path, *statements: str) -> None:
    with duckdb.connect(str(path)) as con:
        for statement in statements:
            con.execute(statement)


def test_the_same_rows_in_two_stores_are_one_snapshot(tmp_path: Path) -> None:
    some = groups(3)
    first = taken(tmp_path / "a.duckdb", some)
    shuffled = random.Random(1).sample(some, len(some))
    second = taken(tmp_path / "b.duckdb", shuffled)
    assert first == second and len(first.snapshot_id) == 64
    assert [row.trajectory_id for row in first.rows] == sorted(row.trajectory_id for row in first.rows)
    with open_reader(tmp_path / "a.duckdb") as reader:
        as_column = "SELECT t.*, value AS reward FROM trajectories t JOIN rewards USING (rollout_id)"
        assert select(reader, as_column).snapshot_id == first.snapshot_id, "however it is asked for"
    reconstruct(tmp_path / "b.duckdb", [one.rollout for one in some])
    with open_reader(tmp_path / "b.duckdb") as reader:
        assert select(reader, QUERY) == first, "written anew"


def test_an_id_that_another_machine_must_find() -> None:
    rows = [
        Row("t2", "r", "g", None, "timeout", "d2"),
        Row("t1", "r", "g", 0.1, "completed", "d1"),
    ]
    text = b'["t1","r","g",0.1,"completed","d1"]\n["t2","r","g",null,"timeout","d2"]\n'
    found = Snapshot.of(rows, query="q", builder="forest")
    assert found.snapshot_id == hashlib.sha256(text).hexdigest()
    assert found.snapshot_id == Snapshot.of(rows[::-1], query="other", builder="forest").snapshot_id


PIECES = st.tuples(st.sampled_from("abc"), st.sampled_from("rs"), st.sampled_from("gh"), st.floats(0, 1))


@given(
    st.lists(PIECES, max_size=4, unique_by=lambda piece: piece[0]),
    st.lists(PIECES, max_size=4, unique_by=lambda p: p[0]),
)
def test_ids_are_equal_where_rows_are(a: list[tuple], b: list[tuple]) -> None:  # type: ignore[type-arg]
    one, other = (
        Snapshot.of([Row(*piece, "completed", "d") for piece in pieces], query="", builder="")
        for pieces in (a, b)
    )
    assert (one.snapshot_id == other.snapshot_id) == (sorted(a) == sorted(b))


@pytest.mark.parametrize("name", ["token_ids", "loss_mask", "behaviour_logprobs"])
def test_any_token_counts(name: str) -> None:
    trajectory = rollout("a", "g", 1.0).finished.trajectories[0]
    digest = digest_of(trajectory)
    assert digest == digest_of(replace(trajectory))
    array = getattr(trajectory, name)
    for at in range(array.size):
        other = array.copy()
        other[at] += 1
        assert digest_of(replace(trajectory, **{name: other})) != digest
    assert digest_of(replace(trajectory, **{name: array.astype(array.dtype.newbyteorder(">"))})) == digest


def test_a_span_s_weights_count() -> None:
    trajectory = rollout("a", "g", 1.0).finished.trajectories[0]
    other = msgspec.structs.replace(trajectory.spans[0], policy_version="step-9")
    assert digest_of(replace(trajectory, spans=(other, *trajectory.spans[1:]))) != digest_of(trajectory)


def test_lengths_do_not_run_into_each_other() -> None:
    trajectory = rollout("a", "g", 1.0).finished.trajectories[0]
    tokens = np.array([1, 2], np.int32)
    a = replace(trajectory, token_ids=tokens, loss_mask=np.zeros(0, np.uint8), spans=())
    b = replace(trajectory, token_ids=tokens[:1], loss_mask=tokens[1:].view(np.uint8), spans=())
    assert digest_of(a) != digest_of(b)


# --- pinned ---------------------------------------------------------------------------------------------


@pytest.fixture
def pinned(tmp_path: Path) -> tuple[Path, Snapshot]:
    return tmp_path / "s.duckdb", taken(tmp_path / "s.duckdb", groups(2))


def check(path: Path, snapshot: Snapshot) -> None:
    with open_reader(path) as reader:
        verify(reader, snapshot)


def test_what_is_new_since_does_not_matter(pinned: tuple[Path, Snapshot]) -> None:
    path, snapshot = pinned
    check(path, snapshot)
    record(path, [rollout("new", "g0", 1.0), rollout("newer", "g9", None)])
    check(path, snapshot)
    with open_reader(path) as reader:
        assert select(reader, QUERY).snapshot_id != snapshot.snapshot_id


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "UPDATE trajectory_pages SET token_ids = [9] || token_ids[2:]",
            r"12 another digest \(first g0r0-0\)",
        ),
        ("UPDATE rewards SET value = 5 WHERE rollout_id = 'g0r1'", "2 another reward"),
        ('INSERT INTO rewards SELECT * REPLACE (7 AS value, 9e9 AS "at") FROM rewards', "12 another reward"),
        ("DELETE FROM rewards WHERE rollout_id = 'g0r0'", "1 another reward"),
        ("UPDATE rollout_rows SET group_id = 'g9' WHERE group_id = 'g1'", "6 another group_id"),
        ("UPDATE rollout_rows SET status = 'failed' WHERE rollout_id = 'g1r0'", "1 another status"),
        ("UPDATE rollout_rows SET incomplete = 'holes' WHERE rollout_id = 'g0r0'", "1 gone"),
        ("DELETE FROM trajectory_rows WHERE rollout_id = 'g0r3'", r"2 gone \(first g0r3-0\)"),
        ("DELETE FROM trajectory_rows", "selects no trajectory"),
        ("DELETE FROM rewards", "has a reward"),
    ],
)
def test_a_row_that_differs_is_refused(pinned: tuple[Path, Snapshot], statement: str, message: str) -> None:
    path, snapshot = pinned
    change(path, statement)
    with pytest.raises(DataError, match=rf"no longer holds snapshot {snapshot.snapshot_id[:12]}.*{message}"):
        check(path, snapshot)


def test_a_row_that_is_refused_now_says_why(tmp_path: Path) -> None:
    path = record(tmp_path / "s.duckdb", groups(2))
    with open_reader(path) as reader:
        snapshot = select(reader, "SELECT trajectory_id FROM trajectories")
    change(path, "UPDATE rollout_rows SET incomplete = 'holes' WHERE rollout_id = 'g0r0'")
    with pytest.raises(DataError, match=r"1 gone; refused now: 1 of an incomplete rollout \(holes\)"):
        check(path, snapshot)


def test_a_record_of_it(pinned: tuple[Path, Snapshot], tmp_path: Path) -> None:
    _, snapshot = pinned
    snapshot.save(tmp_path / "snapshot.json")
    assert Snapshot.load(tmp_path / "snapshot.json") == snapshot
    text = (tmp_path / "snapshot.json").read_text()
    for damaged, message in (
        (text.replace('"reward": 1.0', '"reward": 0.5', 1), "its rows are not those of snapshot"),
        (text[:-2], "is no snapshot"),
        ("{}", "is no snapshot"),
    ):
        (tmp_path / "damaged.json").write_text(damaged)
        with pytest.raises(DataError, match=message):
            Snapshot.load(tmp_path / "damaged.json")
    with pytest.raises(DataError, match="is no snapshot"):
        Snapshot.load(tmp_path / "missing.json")
