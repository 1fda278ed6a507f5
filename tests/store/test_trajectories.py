"""What a builder makes is a table, whole in SQL and as packed batches, and is replaced as a whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polar_mitm.errors import StoreError
from polar_mitm.store import Recorder, open_reader
from polar_mitm.store.batches import PackedBatch, packed, packed_batches
from polar_mitm.store.offline import writing
from polar_mitm.store.trajectories import StoredSpan, TrajectoryWriter, mask_runs, stored_trajectories
from polar_mitm.types import Rollout


@dataclass(frozen=True)
class Built:
    """A trajectory by hand."""

    trajectory_id: str
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    behaviour_logprobs: NDArray[np.float32]
    rollout_id: str = "r1"
    group_id: str | None = "g"
    role: str = "main"
    spans: tuple[object, ...] = field(default_factory=tuple)
    policy_version_min: str | None = "6"
    policy_version_max: str | None = "7"
    agent_id: str | None = "agent-1"


SPAN = {
    "call_id": "c",
    "start": 0,
    "sampled_start": 2,
    "end": 3,
    "mask_reason": "orphan",
    "truncated": True,
    "policy_version": "6",
    "policy_version_last": None,
}


def built(name: str, mask: list[int], rollout_id: str = "r1") -> Built:
    flags = np.array(mask, np.uint8)
    ids = np.arange(flags.size, dtype=np.int32) * 7 + len(name)
    logprobs = np.where(flags == 1, -np.arange(flags.size) / 8, 0).astype(np.float32)
    return Built(name, ids, flags, logprobs, rollout_id, spans=(SPAN,))


def empty(path: Path) -> Path:
    with Recorder(path, share=False) as recorder:
        recorder.rollout(Rollout("r1", status="completed"))
    return path


def write(
    path: Path, some: list[Built], builder: str = "forest", rollouts: tuple[str, ...] = ("r1",)
) -> None:
    with writing(path) as store:
        writer = TrajectoryWriter(store, builder, rollouts)
        for rollout_id in rollouts:
            mine = [t for t in some if t.rollout_id == rollout_id]
            writer.write(rollout_id, mine, {"trained": sum(int(t.loss_mask.sum()) for t in mine)})
        writer.flush()


def check(batch: PackedBatch, some: list[Built]) -> None:
    assert batch.trajectory_ids == tuple(t.trajectory_id for t in some)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum([t.token_ids.size for t in some])]
    for name, kind in (("token_ids", "int32"), ("loss_mask", "uint8"), ("behaviour_logprobs", "float32")):
        array = getattr(batch, name)
        assert (
            array.dtype == kind
            and array.tolist() == np.concatenate([getattr(t, name) for t in some]).tolist()
        )


SOME = [
    built("a", [0] * 1300 + [1] * 700 + [0, 1, 1]),
    built("bb", [0, 0, 1, 1, 0]),
    built("ccc", [1] * 512),
    built("none", [0, 0, 0]),
    built("other", [0, 1], "r2"),
]


def test_a_table_and_its_views(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    write(path, SOME, rollouts=("r1", "r2"))
    with open_reader(path) as reader:
        rows = reader.sql("FROM trajectories_full ORDER BY trajectory_no").to_pylist()
        light = reader.sql("FROM trajectories ORDER BY trajectory_no").to_pylist()
        builds = reader.sql("SELECT rollout_id, builder, report FROM builds ORDER BY ALL").to_pylist()
    for row, one in zip(rows, SOME, strict=True):
        plain = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in asdict(one).items()}
        assert {name: row[name] for name in plain} == plain | {"spans": [SPAN]}
        assert (row["num_tokens"], row["num_trained"]) == (one.token_ids.size, one.loss_mask.sum())
        assert row["builder"] == "forest" and row["built_at"] > 1e9
    assert light == [{n: v for n, v in row.items() if n in light[0]} for row in rows]
    with open_reader(path) as reader:
        stored = [t for r in ("r1", "r2") for t in stored_trajectories(reader, r, "forest")]
        assert list(stored_trajectories(reader, "r1", "nobody")) == []
    for found, one in zip(stored, SOME, strict=True):
        for name in ("token_ids", "loss_mask", "behaviour_logprobs"):
            array, expected = getattr(found, name), getattr(one, name)
            assert array.dtype == expected.dtype and np.array_equal(array, expected)
        assert found.spans == (StoredSpan(**SPAN),)
        for name in ("trajectory_id", "rollout_id", "group_id", "role", "agent_id", "policy_version_min"):
            assert getattr(found, name) == getattr(one, name)
    assert [b["report"] for b in builds] == ['{"trained":1216}', '{"trained":1}']


def test_batches(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    write(path, SOME, rollouts=("r1", "r2"))
    write(path, SOME[:1], "per-request")
    with open_reader(path) as reader:
        first, second = packed_batches(reader, max_tokens=2010)
        check(first, SOME[:2])
        check(second, [SOME[2], SOME[4]])
        (whole,) = packed_batches(reader, max_tokens=10_000, trained_only=False, reuse=True)
        check(whole, SOME)
        for batch, one in zip(packed_batches(reader, max_tokens=2003, reuse=True), (0, 2), strict=False):
            check(batch, SOME[one : one + 1] if one == 0 else [SOME[1], SOME[2], SOME[4]])
        (other,) = packed_batches(reader, max_tokens=10, rollout_ids=["r2", "it's"])
        check(other, SOME[4:])
        (only,) = packed_batches(reader, max_tokens=2003, builder="per-request")
        check(only, SOME[:1])
        assert list(packed_batches(reader, max_tokens=10, rollout_ids=[])) == []
        assert list(packed_batches(reader, max_tokens=10, builder="nobody")) == []
        with pytest.raises(StoreError, match="trajectory a has 2003 tokens, a batch 2002"):
            next(packed_batches(reader, max_tokens=2002))


def test_some_by_number(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    write(path, SOME, rollouts=("r1", "r2"))
    with open_reader(path) as reader:
        check(packed(reader, [4, 0, 2, 0]), [SOME[0], SOME[2], SOME[4]])
        check(packed(reader, [3]), SOME[3:4])
        with pytest.raises(StoreError, match="its trajectories are damaged"):
            packed(reader, [4, 5])


def test_what_became_incomplete_is_in_no_batch(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    write(path, SOME, rollouts=("r1", "r2"))
    with Recorder(path, share=False) as recorder:
        assert recorder.rollout(Rollout("r1", status="completed", incomplete="a call is missing")).result()
    with open_reader(path) as reader:
        for only in (None, ["r1", "r2"]):
            batches = packed_batches(reader, max_tokens=10_000, rollout_ids=only)
            assert {rollout_id for batch in batches for rollout_id in batch.rollout_ids} == {"r2"}


def test_batches_keep_their_arrays_unless_told_otherwise(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    some = [built("x" * n, [0, 1, n % 2]) for n in range(1, 5)]
    write(path, some)
    with open_reader(path) as reader:
        for batch, one in zip(list(packed_batches(reader, max_tokens=3)), some, strict=True):
            check(batch, [one])
        kept = list(packed_batches(reader, max_tokens=3, reuse=True))
        assert len({batch.token_ids.ctypes.data for batch in kept}) == 1


def test_a_build_replaces_the_one_before(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    write(path, SOME, rollouts=("r1", "r2"))
    write(path, SOME, "per-request", rollouts=("r1", "r2"))
    write(path, [built("new", [0, 1, 1])])
    with open_reader(path) as reader:
        (batch,) = packed_batches(reader, max_tokens=10)
        check(batch, [SOME[4], built("new", [0, 1, 1])])
        assert len(reader.sql("FROM builds")) == 4
        assert len(next(packed_batches(reader, max_tokens=9999, builder="per-request")).trajectory_ids) == 4
        pages = "SELECT count(DISTINCT trajectory_no) AS n FROM trajectory_pages"
        assert reader.sql(pages)["n"][0].as_py() == 2 + 5


def test_a_build_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    write(path, SOME[:1])

    def broken():  # type: ignore[no-untyped-def]
        yield SOME[1]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError), writing(path) as store:
        TrajectoryWriter(store, "forest", ["r1"]).write("r1", broken(), {})
    with open_reader(path) as reader:
        (batch,) = packed_batches(reader, max_tokens=9999)
        check(batch, SOME[:1])


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM trajectory_pages WHERE page = 1",
        "UPDATE trajectory_pages SET token_ids = token_ids || [1] WHERE page = 0",
        "UPDATE trajectory_pages SET trained_logprobs = trained_logprobs[2:] WHERE page = 3",
        "UPDATE trajectory_rows SET num_tokens = 1",
        "UPDATE trajectory_rows SET mask_runs = [0, 1]",
        "INSERT INTO trajectory_pages FROM trajectory_pages",
    ],
)
def test_damaged_trajectories_are_refused(tmp_path: Path, damage: str) -> None:
    path = empty(tmp_path / "s.duckdb")
    write(path, SOME[:1])
    with duckdb.connect(str(path)) as con:
        con.execute(damage)
    with open_reader(path) as reader, pytest.raises(StoreError, match="its trajectories are damaged"):
        list(packed_batches(reader, max_tokens=9999))
    with open_reader(path) as reader, pytest.raises(StoreError, match="trajectory a is damaged"):
        list(stored_trajectories(reader, "r1", "forest"))


def test_a_store_in_use_is_not_written(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    with Recorder(path), pytest.raises(StoreError, match=r"process \d+ records into"):
        write(path, SOME)
    with open_reader(path), pytest.raises(StoreError, match="locked by"):
        write(path, SOME)
    write(path, SOME)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1), max_size=40))
def test_runs_are_the_mask(mask: list[int]) -> None:
    runs = mask_runs(np.array(mask, np.uint8)).tolist()
    assert [n % 2 for n, length in enumerate(runs) for _ in range(length)] == mask
    assert all(length > 0 for length in runs[1:])


def test_batches_of_a_store_that_a_capture_writes(tmp_path: Path) -> None:
    path = empty(tmp_path / "s.duckdb")
    write(path, SOME)
    with Recorder(path), open_reader(path) as reader:
        batches = list(packed_batches(reader, max_tokens=2003))
        assert [len(batch.trajectory_ids) for batch in batches] == [1, 2]
        check(batches[0], SOME[:1])
        assert [t.trajectory_id for t in stored_trajectories(reader, "r1", "forest")][-1] == "none"
