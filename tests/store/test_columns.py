"""Rollouts as columns are the same calls as rollouts as structs, and holes are marked as lost."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest

from polar_mitm.columns import LOST_BASE, NO_BASE, RolloutColumns
from polar_mitm.store import Recorder, open_reader
from polar_mitm.store import columns as columns_module
from polar_mitm.store.columns import each_rollout, rollout_columns
from polar_mitm.types import ModelCall, Usage
from tests.store.calls import call, conversation


def stored(path: Path, calls: list[ModelCall]) -> Path:
    with Recorder(path, share=False) as recorder:
        assert all([f.result() for f in [recorder.call(c) for c in calls]])
    return path


def prompts(found: RolloutColumns) -> dict[str, list[int]]:
    """Whole prompts, one at a time, as the docstring of `RolloutColumns` says."""
    done: dict[int, list[int]] = {}

    def of(row: int) -> list[int]:
        if row not in done:
            lists = found.suffix
            own = lists.values[lists.offsets[row] : lists.offsets[row + 1]].tolist()
            base = int(found.base[row])
            assert base != LOST_BASE
            head = [] if base == NO_BASE else (of(base) + sampled(found, base))[: found.shared[row]]
            done[row] = head + own
        return done[row]

    return {call_id: of(row) for row, call_id in enumerate(found.call_ids)}


def sampled(found: RolloutColumns, row: int) -> list[int]:
    lists = found.completion
    return lists.values[lists.offsets[row] : lists.offsets[row + 1]].tolist()


NOTED = {"notes": ["withheld:web_search", "guided:tool_choice"]}
MADE = [
    call(
        "a", [1, 2, 3], [4, 5], seq=0, usage=Usage(3, 2), policy_version="7", role="subagent", started_at=2.0
    ),
    call(
        "b", [1, 2, 3, 4, 5, 6], [7], seq=1, continuation="exact", parent_call_id="a", tokenizer="q", **NOTED
    ),
    call("c", [1, 2, 3, 4, 9], [], seq=2, fallback="history_edited", status="cancelled", delivered=True),
    call("e", [], [], seq=3, status="failed", policy_version_last="8", replayed_from="z", model_served="m"),
    call("d", [1], [2, 3], seq=0, rollout_id="it's"),
]


def test_the_same_calls(tmp_path: Path) -> None:
    with open_reader(stored(tmp_path / "s.duckdb", MADE)) as reader:
        first, none, second = each_rollout(reader, ["r1", "nobody", "it's"])
        alone = rollout_columns(reader, "it's")
        found = {c.call_id: c for c in reader.calls()}
    assert len(none) == 0 and none.suffix.offsets.tolist() == [0]
    assert sorted(first.call_ids) == ["a", "b", "c", "e"] and list(second.call_ids) == ["d"]
    assert prompts(alone) == prompts(second) == {"d": [1]}
    assert prompts(first) == {c.call_id: c.prompt_token_ids for c in MADE[:4]}
    for row, call_id in enumerate(first.call_ids):
        one = found[call_id]
        lists = first.logprobs
        assert sampled(first, row) == one.completion_token_ids
        assert lists.values[lists.offsets[row] : lists.offsets[row + 1]].tolist() == one.behaviour_logprobs
        assert first.num_reported[row] == one.usage.completion_tokens
        for name in columns_module._PLAIN:
            assert getattr(first, name)[row] == getattr(one, name), name
        assert first.guided[row] == (call_id == "b")
    assert first.suffix.values.dtype == np.int32 and first.logprobs.values.dtype == np.float32


def test_rollouts_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [c for n in range(9) for c in conversation(3)]
    for number, each in enumerate(calls):
        each.rollout_id = f"r{number // 3}"
        each.call_id += each.rollout_id
    with open_reader(stored(tmp_path / "s.duckdb", calls)) as reader:
        ids = [f"r{n}" for n in range(9)]
        together = [prompts(found) for found in each_rollout(reader, ids)]
        sizes: list[int] = []
        read = columns_module._read
        monkeypatch.setattr(columns_module, "_MAX_TOKENS", 160)
        monkeypatch.setattr(columns_module, "_read", lambda r, i: sizes.append(len(i)) or read(r, i))
        assert [prompts(found) for found in each_rollout(reader, ids)] == together
    assert sizes == [2, 2, 2, 2, 1]
    assert len(together) == 9 and all(len(each) == 3 for each in together)


@pytest.mark.parametrize(
    "damage, lost",
    [
        ("DELETE FROM call_rows WHERE call_id = 'c0001'", ["c0002"]),
        ("INSERT INTO call_rows FROM call_rows WHERE call_id = 'c0001'", ["c0002"]),
        ("UPDATE call_rows SET prompt_shared = 1000000 WHERE call_id = 'c0002'", ["c0002"]),
        ("UPDATE call_rows SET prompt_shared = -3 WHERE call_id = 'c0002'", ["c0002"]),
        ("UPDATE call_rows SET prompt_suffix = [1] WHERE call_id = 'c0002'", ["c0002"]),
        ("UPDATE call_rows SET prompt_suffix = NULL WHERE call_id = 'c0000'", ["c0000"]),
        ("UPDATE call_rows SET completion_token_ids = NULL WHERE call_id = 'c0000'", ["c0001"]),
        ("UPDATE call_rows SET rollout_id = 'other' WHERE call_id = 'c0002'", ["c0003"]),
    ],
)
def test_a_hole_is_marked(tmp_path: Path, damage: str, lost: list[str]) -> None:
    path = stored(tmp_path / "s.duckdb", conversation(4))
    with duckdb.connect(str(path)) as con:
        con.execute(damage)
    with open_reader(path) as reader:
        found = rollout_columns(reader, "r1")
    assert [c for c, base in zip(found.call_ids, found.base, strict=True) if base == LOST_BASE] == lost


def test_what_a_little_memory_does_not_do_gets_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_mitm.store.reader._SMALL", "1MB")
    made = [call("c", list(range(200_000)), [1])]
    with open_reader(stored(tmp_path / "s.duckdb", made)) as reader:
        assert rollout_columns(reader, "r1").suffix.values.size == 200_000
