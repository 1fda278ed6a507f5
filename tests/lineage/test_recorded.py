"""The list of harmless edits, against what real harnesses sent: each chain is found, and nothing forks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace

from polar_mitm.lineage import Lineage, asked
from polar_mitm.store import Recorder, open_reader
from polar_mitm.types import ChatRequest, ModelCall, Rollout, Wire
from tests.support.recorded import Run, runs


def played(run: Run) -> list[tuple[ModelCall, ChatRequest]]:
    """The calls of a run as they would be recorded."""
    pairs = []
    for call in run.calls:
        done = call.replay().exchange
        record = done.records(delivered=True)[0]
        record.answer = done.completion.message
        pairs.append((record, call.decode()))
    return pairs


@pytest.mark.parametrize("run", runs(), ids=lambda run: run.folder.name)
def test_every_call_of_a_recorded_run_finds_its_parent(run: Run) -> None:
    lineage = Lineage()
    continued: Counter[str] = Counter()
    for record, request in played(run):
        found = lineage.find(request)
        answered = any(message.role == "assistant" for message in request.messages)
        if run.folder.name == "qwen-code-engine-error":
            # It keeps what had come of the broken answer, and then writes that into the next one.
            assert found.fallback == ["first_call", "no_parent", "history_edited"][record.seq]
            continued["none"] = 1
        else:
            assert found.fallback == (None if answered else "first_call")
        if found.parent is not None:
            assert found.edits == (["json_reserialised"] if run.harness == "qwen-code" else [])
            record.parent_call_id = found.parent.call_id
            if record.status == "ok":
                continued[found.parent.call_id] += 1
        lineage.add(record, request)
    assert continued
    assert set(continued.values()) == {1}


@pytest.mark.parametrize("run", runs(), ids=lambda run: run.folder.name)
def test_a_restart_between_any_two_calls_changes_nothing(run: Run, tmp_path: Path) -> None:
    pairs = played(run)
    with Recorder(tmp_path / "s.duckdb") as recorder:
        recorder.rollout(Rollout("recorded"))
        for record, _ in pairs:
            recorder.call(record)
    with open_reader(tmp_path / "s.duckdb") as reader:
        stored = sorted(reader.calls(wire=True), key=lambda call: call.seq)
    for number, (_, request) in enumerate(pairs):
        live, restored = Lineage(), Lineage()
        for pair in pairs[:number]:
            live.add(*pair)
        restored.restore(asked(stored[:number]), tokenizer=pairs[0][0].tokenizer)
        found = [lineage.find(request) for lineage in (live, restored)]
        assert found[0].named == found[1].named
        assert found[0].fallback == found[1].fallback
        assert found[0].edits == found[1].edits
        assert (found[0].parent is None) == (found[1].parent is None)


def test_what_another_tokenizer_made_is_not_continued_after_a_restart() -> None:
    pairs = played(runs()[0])
    lineage = Lineage()
    lineage.restore(pairs[:-1], tokenizer="another")
    assert lineage.find(pairs[-1][1]).fallback == "parent_not_usable"


def test_a_refused_call_has_no_request() -> None:
    (record, _), *_ = played(runs()[0])
    assert [call for call, _ in asked([record, replace(record, status="refused", wire=Wire())])] == [record]
