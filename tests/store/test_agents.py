"""Sub-agents in the store: on calls, in views, and in stores from before there were any."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from polar_mitm.cli import output
from polar_mitm.cli.calls import brief, tell_calls
from polar_mitm.store import Recorder, open_reader, schema
from tests.store.calls import call

AGENT = "agent-0123456789"


def test_a_calls_agent_comes_back_and_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        recorder.call(call("c0", role="main"))
        recorder.call(call("c1", role="subagent", agent_id=AGENT))
        recorder.call(call("c2", role="auxiliary", agent_id=AGENT, tokenizer="t"))
    with open_reader(path) as reader:
        assert {c.call_id: c.agent_id for c in reader.calls()} == {"c0": None, "c1": AGENT, "c2": AGENT}
        own = reader.sql(f"SELECT call_id FROM calls WHERE agent_id = '{AGENT}' ORDER BY 1")
        assert own["call_id"].to_pylist() == ["c1", "c2"]
        full = reader.sql("SELECT call_id, agent_id FROM calls_full ORDER BY 1").to_pylist()
        assert [row["agent_id"] for row in full] == [None, AGENT, AGENT]
        assert reader.sql("SELECT agent_id FROM trajectories_full").num_rows == 0
        columns = reader.sql("SELECT lineage FROM stored_calls ORDER BY call_id")["lineage"].to_pylist()
    assert columns[0] is None  # what most calls do not have takes no room
    assert msgspec.json.decode(columns[2]) == {"tokenizer": "t", "agent_id": AGENT}


def test_a_store_from_before_has_none(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        recorder.call(call("c0", role="subagent"))
    with schema.connect(path) as con:  # what the third schema had
        con.execute(
            "DROP VIEW trajectories_full; DROP VIEW trajectories; DROP VIEW calls_full; DROP VIEW calls"
        )
        con.execute("ALTER TABLE trajectory_rows DROP COLUMN agent_id")
        con.execute("DELETE FROM schema_migrations WHERE version >= 4")
        con.execute(
            "INSERT INTO trajectory_rows (trajectory_no, trajectory_id, rollout_id, builder) "
            "VALUES (0, 'c0', 'r1', 'forest')"
        )
    with open_reader(path) as reader:
        assert reader.schema_version >= 4
        (found,) = reader.calls()
        assert (found.role, found.agent_id) == ("subagent", None)
        assert reader.sql("SELECT trajectory_id, agent_id FROM trajectories").to_pylist() == [
            {"trajectory_id": "c0", "agent_id": None}
        ]


@pytest.mark.parametrize("agents", [True, False])
def test_calls_are_listed_with_agents_where_there_are_any(
    agents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = io.StringIO()
    monkeypatch.setattr(output, "_out", lambda: Console(file=text, width=200))
    calls = [call("c0"), call("c1", role="subagent", agent_id=AGENT if agents else None)]
    tell_calls(iter(calls), {"c0": (1, 2), "c1": (3, 4)})
    head, *lines = text.getvalue().splitlines()
    assert ("agent" in head.split()) is agents
    assert [AGENT in line for line in lines] == [False, agents]
    assert brief(calls[1], 1, 2)["agent_id"] == (AGENT if agents else None)
