"""Sub-agents by name: equal prompts of two of them are two threads, not an answer and its retry."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_mitm.reconstruct import build
from polar_mitm.store import Recorder, open_reader
from polar_mitm.store.columns import rollout_columns
from tests.reconstruct.calls import call, trained_in


@pytest.mark.parametrize(
    ("agents", "orphans"),
    [
        (("a1", "a2"), 0),
        (("a1", "a1"), 1),  # one agent that asked again
        ((None, None), 1),
        (("a1", None), 0),
    ],
)
def test_equal_prompts_are_siblings_of_one_agent_only(
    agents: tuple[str | None, str | None], orphans: int, tmp_path: Path
) -> None:
    calls = [
        call(name, [1, 2, 3], [4, number], role="subagent", agent_id=agent, delivered=number == 1)
        for number, (name, agent) in enumerate(zip("ab", agents, strict=True))
    ]
    trajectories, report = build(calls)
    assert len(trained_in(trajectories)) == 2 - orphans
    assert report.masked == ({"orphan": 2} if orphans else {})
    assert {t.trajectory_id: t.agent_id for t in trajectories} == dict(zip("ab", agents, strict=True))
    # The same out of a store.
    with Recorder(tmp_path / "s.duckdb", share=False) as recorder:
        for each in calls:
            recorder.call(each)
    with open_reader(tmp_path / "s.duckdb") as reader:
        stored, again = build(rollout_columns(reader, "r1"))
        assert again == report
        assert [t.agent_id for t in stored] == [t.agent_id for t in trajectories]


def test_sub_agents_train_and_side_calls_do_not() -> None:
    """Whether a call trains is by its role, as ever."""
    calls = [
        call(name, [number], [number + 10], role=role)
        for number, (name, role) in enumerate(
            [("a", "main"), ("b", "subagent"), ("c", "auxiliary"), ("d", "compaction")]
        )
    ]
    trajectories, report = build(calls)
    assert sorted(trained_in(trajectories)) == ["a", "b"]
    assert report.masked == {"auxiliary": 1, "compaction": 1}
    trajectories, _ = build(calls, include_auxiliary=True, include_compaction=True)
    assert sorted(trained_in(trajectories)) == ["a", "b", "c", "d"]
