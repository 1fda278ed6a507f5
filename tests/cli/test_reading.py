"""calls, show, reconstruct and export: for people at 80 columns, for pipes, for machines."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from polar_mitm.types import Rollout
from tests.cli.conftest import Polar, record, sampled


def test_calls_for_people(polar: Polar, store: Path) -> None:
    told = polar("calls", "--store", store)
    assert told.code == 0
    lines = told.out.splitlines()
    assert lines[0] == "rollout rollout-A  claude-code 1.2  completed, exit 0"
    assert " ".join(lines[1].split()) == "call role dialect status prompt sampled first ms tok/s outcome"
    assert " ".join(lines[2].split()) == "rollout-A-call-0 main anthropic ok 10 4 500 2.0 stop"
    assert "refused    2x  [/bold]telemetry.example" in lines
    assert lines[-1] == "3 calls in 2 rollouts"
    assert "stubbed" not in told.out and "HEAD" not in told.out
    assert "the disk was full" in told.err  # why its record is incomplete


@pytest.mark.parametrize("command", ["calls", "show rollout-B-call-0 --tokens", "reconstruct"])
def test_eighty_columns(command: str, polar: Polar, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = polar(*command.split(), "--store", store)
    assert told.code == 0
    tables = [line for line in told.out.splitlines() if "   " in line]
    assert tables and all(len(line) <= 80 for line in tables)
    assert "\u2026" not in told.out  # nothing is cut


def test_what_a_sandbox_wrote_cannot_move_the_cursor(polar: Polar, store: Path) -> None:
    for command in (["calls"], ["show", "rollout-B-call-0"]):
        told = polar(*command, "--store", store)
        assert not {"\x1b", "\x07"} & set(told.out + told.err)
    assert "\\x1b[2Jcleared [/red] \\x07" in told.out


def test_calls_for_machines(polar: Polar, store: Path) -> None:
    told = polar("calls", "--store", store, "--json").json
    assert [r["rollout_id"] for r in told["rollouts"]] == ["rollout-A", "rollout-B"]
    first = told["calls"][0]
    assert (first["call_id"], first["num_prompt_tokens"], first["num_sampled_tokens"]) == (
        "rollout-A-call-0",
        10,
        4,
    )
    assert first["first_token_ms"] == 500 and first["tokens_per_s"] == 2
    assert not {"prompt_token_ids", "wire", "behaviour_logprobs"} & set(first)
    assert [e["verdict"] for e in told["egress"]] == ["refused", "refused", "refused", "stubbed"]


def test_one_rollout_by_the_end_of_its_id(polar: Polar, store: Path) -> None:
    told = polar("calls", "--store", store, "--rollout", "B", "--json").json
    assert [c["call_id"] for c in told["calls"]] == ["rollout-B-call-0"]
    assert [r["rollout_id"] for r in told["rollouts"]] == ["rollout-B"] and told["egress"] == []
    told = polar("calls", "--store", store, "--rollout", "")
    assert told.code == 2


def test_show(polar: Polar, store: Path) -> None:
    told = polar("show", "A-call-1", "--store", store, "--tokens", "--wire")
    assert told.code == 0
    words = [line.split() for line in told.out.splitlines()]
    assert ["num_prompt_tokens", "20"] in words and ["http_status", "200"] in words
    assert ["20", "21", "-0.250000"] in words  # position, id, logprob of the first sampled token
    assert '{"ask": 1}' in told.out and "the answer" in told.out

    whole = polar("show", "A-call-1", "--store", store, "--json").json
    assert whole["prompt_token_ids"] == list(range(1, 21))
    assert whole["completion_token_ids"] == list(range(21, 27))
    assert whole["behaviour_logprobs"] == [-0.25] * 6


def test_reconstruct(polar: Polar, store: Path) -> None:
    told = polar("reconstruct", "--store", store, "--json")
    assert told.code == 0
    assert told.json["adds_up"] is True
    assert told.json["accounting"] == {"sampled": 15, "trained": 10, "masked": 0, "quarantined": 5}
    good, bad = told.json["rollouts"]
    assert (good["rollout_id"], good["num_trajectories"], good["report"]["trained"]) == ("rollout-A", 1, 10)
    assert bad["report"]["quarantined"] == {"incomplete_rollout": 5}
    told = polar("reconstruct", "--store", store)
    assert "1 trajectory; 15 sampled = 10 trained + 0 masked + 5 quarantined" in told.out
    assert "incomplete_rollout 5" in told.out


def test_export(polar: Polar, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    told = polar("export", "--store", store, "--out", out, "--json")
    expected = {"path": str(out), "what": "trajectories", "format": "parquet", "num_rows": 1}
    assert (told.code, told.json) == (0, expected)
    (row,) = pq.read_table(out).to_pylist()
    assert row["token_ids"] == list(range(1, 27)) and sum(row["loss_mask"]) == row["num_trained"] == 10
    assert polar("export", "--store", store, "--out", out).code == 2
    told = polar("export", "--store", store, "--out", out, "--force", "--what", "calls")
    assert told.out.strip() == f"3 calls written to {out}"
    assert pq.read_table(out).num_rows == 3


def test_an_empty_store_is_no_error(polar: Polar, tmp_path: Path) -> None:
    path = tmp_path / "empty.duckdb"
    record(path, [], [], [])
    assert polar("calls", "--store", path).out.strip() == "0 calls in 0 rollouts"
    told = polar("reconstruct", "--store", path, "--json")
    assert told.code == 0 and told.json["adds_up"] and told.json["rollouts"] == []
    assert polar("export", "--store", path, "--out", tmp_path / "e.parquet", "--json").json["num_rows"] == 0


def test_rollouts_are_in_memory_one_at_a_time(polar: Polar, tmp_path: Path) -> None:
    peaks = []
    for num_rollouts in (1, 12):
        path = tmp_path / f"{num_rollouts}.duckdb"
        rollouts = [Rollout(f"r{n:02}", status="completed") for n in range(num_rollouts)]
        record(path, rollouts, [sampled(r.rollout_id, 0, 100_000, 1_000) for r in rollouts], [])
        tracemalloc.start()
        assert polar("reconstruct", "--store", path).code == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0]
