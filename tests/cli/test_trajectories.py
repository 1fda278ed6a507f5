"""Builders, splitting, fallbacks, --write and seal: what people and machines see, and what is refused."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from polar_mitm.store import Recorder, open_reader
from polar_mitm.types import ModelCall, Rollout
from tests.cli.conftest import Polar, record, sampled

EXACT = {"continuation": "exact", "tokenizer": "q"}


@pytest.fixture
def continued(tmp_path: Path) -> Path:
    """A rollout of three calls: the first, one that continues it, one that was rendered anew."""
    calls = [
        sampled("rollout-A", 0, 10, 4, fallback="first_call", tokenizer="q"),
        sampled("rollout-A", 1, 20, 6, edits=["trimmed_whitespace"], **EXACT),
        sampled("rollout-A", 2, 5, 3, fallback="history_edited", tokenizer="q", policy_version="7"),
    ]
    calls[2].prompt_token_ids = [101, 102, 103, 104, 105]
    path = tmp_path / "runs.duckdb"
    record(path, [Rollout("rollout-A", status="completed")], calls, [])
    return path


def test_fallbacks_are_counted(polar: Polar, continued: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = polar("reconstruct", "-s", continued, "--json").json
    assert told["num_continued"] == 1 and told["fallbacks"] == {"first_call": 1, "history_edited": 1}
    assert told["rollouts"][0]["report"]["fallbacks"] == told["fallbacks"]
    monkeypatch.setenv("COLUMNS", "80")
    lines = [" ".join(line.split()) for line in polar("reconstruct", "-s", continued).out.splitlines()]
    at = lines.index("rollout exact rendered anew why")
    assert lines[at + 1] == "ollout-A 1 2 first_call 1, history_edited 1"


def test_builders(polar: Polar, continued: Path, tmp_path: Path) -> None:
    counts = {}
    for builder in ("forest", "per-request", "polar-splice"):
        told = polar("reconstruct", "-s", continued, "--builder", builder, "--json").json
        assert told["builder"] == told["rollouts"][0]["report"]["builder"] == builder and told["adds_up"]
        counts[builder] = told["rollouts"][0]["num_trajectories"]
        out = tmp_path / f"{builder}.parquet"
        assert polar("export", "-s", continued, "-o", out, "--builder", builder).code == 0
        rows = pq.read_table(out).to_pylist()
        assert [row["builder"] for row in rows] == [builder] * counts[builder]
    assert (counts["forest"], counts["per-request"]) == (2, 3)


def test_overlong_trajectories_are_split(polar: Polar, continued: Path) -> None:
    told = polar("reconstruct", "-s", continued, "--max-tokens", "15", "--json").json
    assert told["rollouts"][0]["num_trajectories"] == 3 and told["accounting"]["trained"] == 13
    told = polar("reconstruct", "-s", continued, "--max-tokens", "9", "--builder", "polar-splice")
    assert told.code == 2 and "polar-splice does not split" in told.err


def test_write(polar: Polar, continued: Path) -> None:
    told = polar("reconstruct", "-s", continued, "--write", "--json")
    assert told.code == 0 and told.json["written"] and told.json["accounting"]["trained"] == 13
    told = polar("reconstruct", "-s", continued, "--write", "--builder", "per-request")
    assert "SELECT * FROM trajectories WHERE builder = 'per-request'" in told.err
    assert polar("reconstruct", "-s", continued, "--write").code == 0  # again: in place of the first
    with open_reader(continued) as reader:
        rows = reader.sql(
            "FROM trajectories_full WHERE builder = 'forest' ORDER BY num_tokens DESC"
        ).to_pylist()
        reports = reader.sql("SELECT report ->> 'trained' AS n FROM builds").to_pylist()
    assert [(len(row["token_ids"]), sum(row["loss_mask"])) for row in rows] == [(26, 10), (8, 3)]
    spans = rows[0]["spans"]
    assert [(s["call_id"], s["start"], s["sampled_start"], s["end"], s["mask_reason"]) for s in spans] == [
        ("rollout-A-call-0", 0, 10, 14, None),
        ("rollout-A-call-1", 14, 20, 26, None),
    ]
    assert rows[1]["policy_version_min"] == rows[1]["policy_version_max"] == "7"
    assert reports == [{"n": "13"}] * 2


def test_nothing_is_written_that_does_not_add_up(
    polar: Polar, continued: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_mitm.reconstruct.BuildReport.adds_up", property(lambda report: False))
    told = polar("reconstruct", "-s", continued, "--write", "--json")
    assert told.code == 1 and not told.json["written"] and not told.json["adds_up"]
    with open_reader(continued) as reader:
        assert reader.sql("FROM trajectories").num_rows == reader.sql("FROM builds").num_rows == 0


@pytest.mark.parametrize("command", [["reconstruct", "--write"], ["seal", "rollout-A"]])
def test_a_store_that_a_capture_writes_is_not_changed(
    command: list[str], polar: Polar, continued: Path
) -> None:
    with Recorder(continued):
        told = polar(*command, "-s", continued)
        assert told.code == 2 and "records into" in told.err and "once that has stopped" in told.err
        assert polar("reconstruct", "-s", continued).code == 0  # reading goes on
    assert polar(*command, "-s", continued).code == 0


def test_seal(polar: Polar, continued: Path) -> None:
    told = polar("seal", "A", "-s", continued, "--json")
    assert told.code == 0 and told.json["num_records"] == 4 and len(told.json["digest"]) == 64
    again = polar("seal", "A", "-s", continued)
    assert again.code == 2 and "is sealed already" in again.err
    assert polar("seal", "nobody", "-s", continued).code == 2
    assert polar("verify", continued, "--seal").code == 0


def test_only_one_rollout_is_rewritten(polar: Polar, tmp_path: Path) -> None:
    path = tmp_path / "two.duckdb"
    calls: list[ModelCall] = [sampled(r, 0, 5, 2) for r in ("rollout-A", "rollout-B")]
    record(path, [Rollout(r, status="completed") for r in ("rollout-A", "rollout-B")], calls, [])
    assert polar("reconstruct", "-s", path, "--write").code == 0
    assert polar("reconstruct", "-s", path, "--write", "-r", "B").code == 0
    with open_reader(path) as reader:
        rows = reader.sql("SELECT rollout_id FROM trajectories ORDER BY trajectory_no").to_pylist()
    assert [row["rollout_id"] for row in rows] == ["rollout-A", "rollout-B"]


def test_a_rollout_whose_own_record_is_lost_is_named(polar: Polar, continued: Path, tmp_path: Path) -> None:
    with duckdb.connect(continued) as con:
        con.execute("DELETE FROM rollout_rows")
    told = polar("reconstruct", "-s", continued, "--json")
    assert told.json["accounting"] == {"sampled": 13, "trained": 0, "masked": 0, "quarantined": 13}
    for command in (["reconstruct"], ["export", "-o", tmp_path / "t.parquet"]):
        assert "rollout-A is never trained on: its own record is missing" in polar(
            *command, "-s", continued
        ).err.replace("\n", " ")
