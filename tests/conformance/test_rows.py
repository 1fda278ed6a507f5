"""What a run is judged by, and what is seen of it."""

from __future__ import annotations

from typing import Any

import pytest

from polar_mitm.conformance import scenarios
from polar_mitm.conformance.rows import Row, row_of
from polar_mitm.conformance.scenarios import LOOK, PROMPT, RESUMED, SCENARIOS, Ran, Scenario
from polar_mitm.types import EgressEvent, ModelCall, Wire

TWO_TURNS = SCENARIOS["two-turns"]


def call(seq: int = 0, **fields: Any) -> ModelCall:
    given = {
        "fallback": None if seq else "first_call",
        "continuation": "exact" if seq else "none",
        "stream": True,
    }
    given |= {"completion_token_ids": [1, 2], "behaviour_logprobs": [-0.1, -0.2], "wire": wire()}
    given["upstream_body"] = b"{}"
    return ModelCall(
        f"c{seq}", "r", seq, "anthropic", "POST /v1/messages", **{"status": "ok", **given, **fields}
    )


def wire(*headers: tuple[str, str]) -> Wire:
    return Wire("POST", "h", "/v1/messages", list(headers), http_version="HTTP/1.1")


PICTURED = Wire(request_body=b'{"data": "iVBORw0KGgoAAAA"}')


def ran(scenario: Scenario = TWO_TURNS, **fields: Any) -> Ran:
    """A run without a fault."""
    given = {
        "exit_code": 0,
        "output": f"{scenarios.LAST_WORDS}\n",
        "seconds": 1.25,
        "calls": [call(0), call(1)],
    }
    given |= {"events": [], "asked": [], "files": dict(scenario.leaves), "play": scenario.play()}
    return Ran(**{**given, **fields})


def judged(scenario: Scenario = TWO_TURNS, **fields: Any) -> Row:
    return row_of("h", "1", scenario, ran(scenario, **fields))


def test_a_run_without_a_fault_passes() -> None:
    row = judged()
    assert (row.outcome, row.reasons, row.exit_code, row.calls) == ("pass", [], 0, 2)
    assert (row.statuses, row.roles, row.dialects) == ({"ok": 2}, {"main": 2}, ["anthropic"])
    assert (row.followers, row.continued, row.fallbacks, row.edits) == (1, 1, {}, [])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"exit_code": 1}, "exit code 1"),
        ({"files": {}}, "no hello.txt"),
        ({"files": {"hello.txt": "ho"}}, "hello.txt holds 'ho'"),
        ({"output": "I am done"}, "does not print"),
        ({"incomplete": "the disk was full"}, "the disk was full"),
        ({"accounted": False}, "not accounted for"),
        ({"calls": []}, "made no model call"),
        ({"calls": [call(behaviour_logprobs=[])]}, "lacks tokens or logprobs"),
        ({"calls": [call(completion_token_ids=[], behaviour_logprobs=[])]}, "lacks tokens or logprobs"),
        ({"calls": [call(status="refused", error="bad_request: no")]}, "was refused: bad_request"),
    ],
)
def test_each_fault_is_a_failure_with_a_reason(fields: dict[str, Any], reason: str) -> None:
    row = judged(**fields)
    assert row.failed and any(reason in each for each in row.reasons), row.reasons


@pytest.mark.parametrize(
    ("name", "without", "enough"),
    [
        ("engine-500", {}, {"calls": [call(status="failed"), call(1)]}),
        ("cut", {}, {"calls": [call(status="failed"), call(1)]}),
        ("sub-agents", {}, {"calls": [call(), call(1, role="subagent")]}),
        (
            "image",
            {"asked": [{"messages": [{"role": "user", "content": LOOK}]}], "calls": [call(wire=PICTURED)]},
            {
                "asked": [{"messages": [{"role": "tool", "content": [{"type": "image_url"}]}]}],
                "calls": [call(wire=PICTURED)],
            },
        ),
        (
            "resume",
            {"asked": [{"messages": [{"role": "user", "content": RESUMED}]}]},
            {
                "asked": [
                    {"messages": [{"role": "user", "content": [{"text": p}]} for p in (PROMPT, RESUMED)]}
                ]
            },
        ),
    ],
)
def test_what_a_scenario_is_about_has_to_happen(
    name: str, without: dict[str, Any], enough: dict[str, Any]
) -> None:
    assert judged(SCENARIOS[name], **without).failed
    assert judged(SCENARIOS[name], **enough).outcome == "pass"


def test_a_compaction_has_to_be_asked_for_and_recognised() -> None:
    scenario = SCENARIOS["compaction"]
    play = scenario.play()
    play.num_summaries = 1  # type: ignore[attr-defined]
    calls = [call(), call(1, role="compaction")]
    assert judged(scenario, calls=calls, play=play).outcome == "pass"
    assert judged(scenario, calls=calls).reasons == ["it asked for no summary"]
    assert judged(scenario, play=play).reasons == ["no call has the role compaction"]


def test_what_a_harness_lacks_is_no_failure() -> None:
    play = SCENARIOS["image"].play()
    play.lacks = "it does not offer a tool that reads images"
    row = judged(SCENARIOS["image"], play=play, exit_code=1)
    assert (row.outcome, row.reasons) == ("n/a", ["it does not offer a tool that reads images"])


def test_a_harness_whose_model_reads_no_images_sends_none() -> None:
    row = judged(SCENARIOS["image"])
    assert row.outcome == "n/a" and "sends no image" in row.reasons[0]


def test_a_question_has_no_wrong_answer() -> None:
    scenario = SCENARIOS["trust-nothing"]
    row = judged(scenario, exit_code=124, files={}, calls=[])
    assert (row.outcome, row.failed, row.trust) == ("no", False, [])
    assert judged(scenario, exit_code=124, files={}).outcome == "yes"  # it was answered, and too slow
    assert judged(scenario).outcome == "yes"


@pytest.mark.parametrize(
    ("made", "transport", "compression"),
    [
        (call(), "HTTP/1.1 stream", "none"),
        (call(stream=False), "HTTP/1.1 whole", "none"),
        (call(wire=wire(("Content-Encoding", "zstd"))), "HTTP/1.1 stream", "zstd"),
        (
            call(wire=wire(("Upgrade", "websocket"), ("Sec-WebSocket-Extensions", "permessage-deflate; x"))),
            "WebSocket",
            "permessage-deflate",
        ),
    ],
)
def test_transport_and_compression_are_read_off_the_wire(
    made: ModelCall, transport: str, compression: str
) -> None:
    row = judged(calls=[made])
    assert (row.transports, row.compression) == ([transport], [compression])


def test_a_prewarm_has_no_tokens_to_lack() -> None:
    nothing = {"completion_token_ids": [], "behaviour_logprobs": []}
    prewarm = call(role="auxiliary", notes=["prewarm"], upstream_body=b"", **nothing)
    row = judged(calls=[prewarm, call(1)])
    assert (row.outcome, row.statuses) == ("pass", {"ok": 1, "prewarm": 1})


def test_prefixes_that_were_not_kept_are_counted_with_their_reason() -> None:
    broken = call(2, continuation="none", fallback="history_edited")
    side = call(3, role="auxiliary", continuation="none", fallback="no_parent")
    row = judged(calls=[call(), call(1, edits=["retokenised"]), broken, side])
    assert (row.followers, row.continued, row.fallbacks) == (2, 1, {"history_edited": 1})
    assert row.edits == ["retokenised"]


def test_what_was_refused_is_named_once() -> None:
    events = [EgressEvent("r", 1.0, "refused", "dns", "x.example")] * 2
    events.append(EgressEvent("r", 1.0, "stubbed", "path", "GET h/"))
    assert judged(events=events).refused == ["x.example"]


def test_every_scenario_can_be_played_and_names_itself() -> None:
    for name, scenario in SCENARIOS.items():
        assert scenario.name == name and scenario.title and scenario.prompts
        assert scenario.play() is not scenario.play()


def test_choosing() -> None:
    assert scenarios.chosen([], False) == list(SCENARIOS.values())
    fast = scenarios.chosen([], True)
    assert TWO_TURNS in fast and all(each.fast for each in fast) and len(fast) < len(SCENARIOS)
    assert scenarios.chosen(["cut", "two-turns", "cut"], False) == [SCENARIOS["cut"], TWO_TURNS]
    with pytest.raises(KeyError):
        scenarios.chosen(["no-such"], False)
