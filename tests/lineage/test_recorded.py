"""The list of harmless edits, against what real harnesses sent: each chain is found, and nothing forks."""

from __future__ import annotations

from collections import Counter

import pytest

from polar_mitm.lineage import Lineage
from polar_mitm.types import ChatRequest, ModelCall
from tests.support.recorded import Run, runs


def played(run: Run) -> list[tuple[ModelCall, ChatRequest]]:
    """The calls of a run as they would be recorded."""
    pairs = []
    for call in run.calls:
        done = call.replay().exchange
        record = done.record(delivered=True)
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
        assert found.fallback == (None if answered else "first_call")
        if found.parent is not None:
            assert found.edits == []
            record.parent_call_id = found.parent.call_id
            if record.status == "ok":
                continued[found.parent.call_id] += 1
        lineage.add(record, request)
    assert continued
    assert set(continued.values()) == {1}


@pytest.mark.parametrize("run", runs(), ids=lambda run: run.folder.name)
def test_a_restart_between_any_two_calls_changes_nothing(run: Run) -> None:
    pairs = played(run)
    for number, (_, request) in enumerate(pairs):
        live, restored = Lineage(), Lineage()
        for pair in pairs[:number]:
            live.add(*pair)
        restored.restore(
            (record, call.decode()) for (record, _), call in zip(pairs[:number], run.calls, strict=False)
        )
        found = [lineage.find(request) for lineage in (live, restored)]
        assert found[0].named == found[1].named
        assert found[0].fallback == found[1].fallback
