"""Parquet files read back by another program's reader (DuckDB) hold what was exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from polar_mitm.export import CALLS, TRAJECTORIES, export_calls, export_trajectories
from polar_mitm.reconstruct import build
from polar_mitm.types import ModelCall, Rollout, Sampling, Usage
from tests.reconstruct.calls import call, follow

A = call("a", [1, 2], [3, 4], policy_version="7")
B = follow("b", A, [5], [6], status="cancelled", delivered=False, parent_call_id="a")
TITLE = call("t", [9], [150_000], role="auxiliary")


def rows(path: Path) -> list[dict[str, Any]]:
    with duckdb.connect() as db:
        found = db.execute("select * from read_parquet(?)", [str(path)])
        assert found.description is not None
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def test_trajectories_read_back(tmp_path: Path) -> None:
    trajectories, _ = build([A, B, TITLE], rollout=Rollout("r1", group_id="g"))
    path = tmp_path / "t.parquet"
    assert export_trajectories(iter(trajectories), path, builder="per-request") == 2
    main, title = rows(path)
    for row, source in zip((main, title), trajectories, strict=True):
        assert row["trajectory_id"] == source.trajectory_id and row["role"] == source.role
        assert row["token_ids"] == source.token_ids.tolist()
        assert row["loss_mask"] == source.loss_mask.tolist()
        assert np.array_equal(np.float32(row["behaviour_logprobs"]), source.behaviour_logprobs)
        assert (row["num_tokens"], row["num_trained"]) == (len(row["token_ids"]), sum(row["loss_mask"]))
    assert main["group_id"] == "g" and main["policy_version_min"] == main["policy_version_max"] == "7"
    assert main["spans"][1] == {
        "call_id": "b",
        "start": 4,
        "sampled_start": 5,
        "end": 6,
        "mask_reason": None,
        "truncated": True,
        "policy_version": None,
        "policy_version_last": None,
    }
    assert {row["builder"] for row in (main, title)} == {"per-request"}
    assert title["spans"][0]["mask_reason"] == "auxiliary" and title["num_trained"] == 0


def test_calls_read_back(tmp_path: Path) -> None:
    rich = call(
        "a",
        [1, 2],
        [3],
        sampling=Sampling(temperature=1.0, stop=["END"]),
        notes=["withheld:web_search"],
        continuation="exact",
        edits=["trimmed_whitespace"],
        policy_version_last="8",
        tokenizer="t",
        usage=Usage(prompt_tokens=2, completion_tokens=1),
        first_token_at=1.5,
    )
    bare = call("b", [], [], status="failed", error="engine down", finish_reason=None)
    path = tmp_path / "c.parquet"
    assert export_calls([rich, bare], path) == 2
    one, two = rows(path)
    for row, source in ((one, rich), (two, bare)):
        for name in set(CALLS.names) - {"sampling", "sampling_requested", "usage"}:
            assert row[name] == getattr(source, name), name
    assert one["sampling"]["temperature"] == 1.0 and one["sampling"]["stop"] == ["END"]
    assert one["sampling_requested"]["temperature"] is None
    assert one["usage"]["prompt_tokens"] == 2 and two["error"] == "engine down"


def test_many_calls_in_several_row_groups_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_mitm.export.parquet._TOKENS_PER_GROUP", 100)
    path = tmp_path / "c.parquet"
    assert export_calls((call(f"c{i:04}", [i], [i + 1]) for i in range(300)), path) == 300
    assert pq.ParquetFile(path).num_row_groups == 3
    assert [row["prompt_token_ids"] for row in rows(path)] == [[i] for i in range(300)]


def test_nothing_to_export_is_a_file_without_rows(tmp_path: Path) -> None:
    assert export_trajectories([], tmp_path / "t.parquet") == 0
    assert rows(tmp_path / "t.parquet") == []


def test_the_file_says_what_it_is_and_is_compressed_with_zstd(tmp_path: Path) -> None:
    export_trajectories(build([A])[0], tmp_path / "t.parquet")
    export_calls([A], tmp_path / "c.parquet")
    for name, schema, version in (("t", TRAJECTORIES, b"trajectories/3"), ("c", CALLS, b"calls/3")):
        file = pq.ParquetFile(tmp_path / f"{name}.parquet")
        assert file.schema_arrow.metadata[b"polar_mitm.schema"] == version
        assert file.schema_arrow.equals(schema)
        assert file.schema_arrow.field("behaviour_logprobs").metadata[b"doc"]
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_an_existing_file_is_overwritten_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        export_calls([A], path)
    assert path.read_bytes() == b"precious"
    assert export_calls([A], path, force=True) == 1
    assert len(rows(path)) == 1


def test_a_failure_leaves_what_was_there_and_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    export_calls([A], path)

    def broken() -> Iterator[ModelCall]:
        yield from [A] * 100
        raise RuntimeError("the store went away")

    with pytest.raises(RuntimeError):
        export_calls(broken(), path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c.parquet"] and len(rows(path)) == 1
    with pytest.raises(OSError):
        export_calls([A], tmp_path / "missing" / "c.parquet")
