"""What becomes of each request of a fresh run, without any IO."""

from __future__ import annotations

from polar_mitm.replay import Replay
from polar_mitm.types import ModelCall
from tests.replay.requests import ANTHROPIC, asking, call, wire


def conversation() -> list[ModelCall]:
    """Two turns of the main thread, with a sub-agent of two turns between them."""
    first = call(0, asking("go"))
    sub = call(1, asking("sub"))
    second = call(2, asking("go", first))
    sub_second = call(3, asking("sub", sub))
    third = call(4, asking("go", first, second))
    return [first, sub, second, sub_second, third]


def outcomes(replay: Replay) -> list[tuple[str, str | None]]:
    return [(step.outcome, step.recorded) for step in replay.report().steps]


def test_every_call_again() -> None:
    calls = conversation()
    replay = Replay("recorded", calls)
    for each in calls:
        _, served = replay.take(ANTHROPIC, each.wire)
        assert served is each
    report = replay.report()
    assert report.faithful and report.unreached == []
    assert (report.num_recorded, report.num_served) == (5, 5)
    assert outcomes(replay) == [("same", each.call_id) for each in calls]


def test_threads_in_another_order() -> None:
    """Sub-agents interleave as they like; each request is told by what it asks."""
    calls = conversation()
    replay = Replay("recorded", calls)
    for n in (1, 0, 3, 2, 4):
        assert replay.take(ANTHROPIC, calls[n].wire)[1] is calls[n]
    assert replay.report().faithful


def test_the_first_field_that_differs() -> None:
    calls = conversation()
    replay = Replay("recorded", calls)
    changed = asking("go", calls[0], tools=[{"name": "Bash", "input_schema": {}}])
    changed["messages"][2]["content"][0]["content"] = "a b c"
    step, served = replay.take(ANTHROPIC, wire(changed))
    assert served is calls[2] and step.outcome == "diverged" and step.num_divergences == 2
    assert step.first is not None
    assert (step.first.field, step.first.kind) == ("body.messages[2].content[0].content", "changed")
    assert (step.first.recorded, step.first.live, step.first.at) == ("a b", "a b c", 3)
    assert not replay.report().faithful


def test_a_request_goes_to_the_call_that_it_differs_least_from() -> None:
    one, other = call(0, asking("one", max_tokens=1)), call(1, asking("other", max_tokens=2))
    replay = Replay("recorded", [one, other])
    assert replay.take(ANTHROPIC, wire(asking("other!", max_tokens=2)))[1] is other
    assert replay.take(ANTHROPIC, wire(asking("other", max_tokens=2)))[1] is one
    assert [step.num_divergences for step in replay.report().steps] == [1, 2]


def test_the_same_request_again_gets_the_next_answer() -> None:
    """A failed call and its retry ask the same: first the failure, then the answer, then nothing."""
    failed, retry = call(0, asking("go"), status="failed"), call(1, asking("go"))
    replay = Replay("recorded", [retry, failed])
    assert replay.take(ANTHROPIC, wire(asking("go")))[1] is failed
    assert replay.take(ANTHROPIC, wire(asking("go")))[1] is retry
    step, served = replay.take(ANTHROPIC, wire(asking("go")))
    assert served is None and step.outcome == "unmatched"
    assert step.note == f"asked again: call {retry.call_id} was answered before"
    assert not replay.report().faithful


def test_no_answer_for_another_kind_of_call() -> None:
    calls = conversation()
    for body in (asking("go", model="other"), asking("go", stream=False), asking("go", calls[2])):
        replay = Replay("recorded", calls)
        step, served = replay.take(ANTHROPIC, wire(body))
        assert served is None and step.outcome == "unmatched" and step.recorded == calls[0].call_id
        assert step.num_divergences > 0 and len(replay.report().unreached) == 5
    step, served = Replay("recorded", calls).take(ANTHROPIC, wire(asking("go"), path="/v1/other"))
    assert served is None and step.recorded is None and step.note == "no recorded call is left"


def test_what_cannot_be_read_is_compared_as_it_is() -> None:
    refused = call(0, b"no json", status="refused")
    replay = Replay("recorded", [refused])
    assert replay.take(ANTHROPIC, wire(b"no json"))[1] is refused
    assert replay.report().faithful


def test_calls_that_were_never_made() -> None:
    calls = conversation()
    replay = Replay("recorded", calls)
    replay.take(ANTHROPIC, calls[0].wire)
    report = replay.report()
    assert report.unreached == [each.call_id for each in calls[1:]] and not report.faithful


def test_a_run_that_was_cut_off_may_go_on() -> None:
    only = call(0, asking("go"), status="cancelled")
    for cut_off, outcome in ((True, "beyond"), (False, "unmatched")):
        replay = Replay("recorded", [only], cut_off=cut_off)
        replay.take(ANTHROPIC, only.wire)
        for body in (asking("go"), asking("and", only)):  # a retry, and a step further
            step, served = replay.take(ANTHROPIC, wire(body))
            assert served is None and step.outcome == outcome
        assert replay.report().faithful == cut_off


def test_a_fork() -> None:
    calls = conversation()
    replay = Replay("recorded", calls, fork_at=calls[2].call_id)
    assert replay.take(ANTHROPIC, calls[0].wire)[1] is calls[0]
    assert not replay.report().forked and not replay.report().faithful
    # The main thread is at the fork while the sub-agent has not asked yet: that is still replayed.
    at_fork, _ = replay.take(ANTHROPIC, calls[2].wire)
    assert (at_fork.outcome, at_fork.recorded, at_fork.first) == ("live", calls[2].call_id, None)
    assert replay.take(ANTHROPIC, calls[1].wire)[1] is calls[1]
    assert replay.take(ANTHROPIC, calls[3].wire)[0].outcome == "live"
    assert replay.take(ANTHROPIC, wire(asking("anything")))[0].outcome == "live"
    report = replay.report()
    assert report.faithful and report.forked and (report.num_recorded, report.num_served) == (2, 2)


def test_a_fork_at_the_first_call_replays_nothing() -> None:
    calls = conversation()
    replay = Replay("recorded", calls, fork_at=calls[0].call_id)
    assert replay.take(ANTHROPIC, wire(asking("another task")))[0].outcome == "live"
    assert replay.report().num_recorded == 0 and replay.report().faithful


def test_before_a_fork_a_strange_request_is_not_sent_to_the_engine() -> None:
    calls = conversation()
    replay = Replay("recorded", calls, fork_at=calls[4].call_id)
    assert replay.take(ANTHROPIC, wire(asking("go", model="other")))[0].outcome == "unmatched"
    assert not replay.report().forked
