"""What goes in comes out: every field, every prompt, while recording, from the file, after a restart."""

from __future__ import annotations

import tempfile
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.store import Recorder, open_reader
from polar_mitm.store.redact import redact_body, redact_headers, redact_path
from polar_mitm.types import (
    EgressEvent,
    Message,
    ModelCall,
    Reward,
    Rollout,
    Sampling,
    TextPart,
    ToolCall,
    Usage,
    Wire,
)
from tests.store.calls import call, conversation

text = st.text(max_size=20)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=12)
small = st.lists(st.integers(0, 3), max_size=12)  # ids that repeat: prompts that share prefixes
# DuckDB's float compression takes -0.0 for 0.0.
logprobs = st.lists(st.floats(width=32).map(lambda x: x + 0.0), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0)
# What looks like a secret does not come back: see test_redact.py.
header = st.tuples(text, text).filter(lambda item: redact_headers([item], ()) == [item])
headers = st.lists(header, max_size=3)
body = st.binary(max_size=60).filter(lambda data: redact_body(data, ()) is data)
sampling = st.builds(
    Sampling,
    temperature=st.none() | finite,
    top_p=st.none() | finite,
    top_k=st.none() | st.integers(0, 100),
    max_tokens=st.none() | st.integers(0, 10**6),
    stop=st.none() | st.lists(text, max_size=3),
)
wires = st.builds(
    Wire,
    method=text,
    host=text,
    path=text.filter(lambda path: redact_path(path, ()) == path),
    request_headers=headers,
    request_body=body,
    status=st.integers(0, 599),
    response_headers=headers,
    response_body=body,
    chunk_sizes=st.lists(st.integers(0, 2**40), max_size=4),
    chunk_at_ms=st.lists(finite, max_size=4),
)
# Ids are cleaned of secrets too, and what is JSON holds no lone surrogates.
answers = st.none() | st.builds(
    Message,
    role=st.just("assistant"),
    content=st.lists(st.builds(TextPart, text), max_size=2),
    reasoning=st.none() | text,
    tool_calls=st.lists(st.builds(ToolCall, id=text, name=text, arguments=text), max_size=2),
    minted_ids=st.lists(text, max_size=2),
)
calls = st.builds(
    ModelCall,
    call_id=st.uuids().map(str),
    rollout_id=st.sampled_from(["r1", "r2", "it's"]),
    seq=st.integers(0, 2**40),
    dialect=text,
    route=text,
    status=st.sampled_from(["ok", "cancelled", "failed", "refused"]),
    model_requested=text,
    model_served=text,
    role=st.sampled_from(["main", "subagent", "auxiliary", "compaction"]),
    agent_id=st.none() | st.text(min_size=1, max_size=9),
    parent_call_id=st.none() | text,
    stream=st.booleans(),
    delivered=st.booleans(),
    finish_reason=st.none() | text,
    error=st.none() | text,
    policy_version=st.none() | text,
    policy_version_last=st.none() | text,
    continuation=st.sampled_from(["exact", "none"]),
    fallback=st.none() | text,
    edits=st.lists(text, max_size=2),
    answer=answers,
    replayed_from=st.none() | text,
    tokenizer=text,
    sampling_requested=sampling,
    sampling=sampling,
    notes=st.lists(text, max_size=3),
    prompt_token_ids=ids | small,
    completion_token_ids=ids | small,
    behaviour_logprobs=logprobs,
    usage=st.builds(Usage, *[st.integers(0, 2**31 - 1)] * 4),
    started_at=finite,
    first_token_at=st.none() | finite,
    ended_at=st.none() | finite,
    wire=wires,
    upstream_body=body,
)


def by_request(found: list[ModelCall]) -> list[str]:
    """Texts, because NaN is not equal to itself."""
    return [repr(c) for c in sorted(found, key=lambda c: (c.rollout_id, c.seq, c.call_id))]


@settings(max_examples=30, deadline=None)
@given(st.lists(calls, min_size=1, max_size=8, unique_by=lambda c: c.call_id))
def test_every_field_of_a_call(made: list[ModelCall]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.duckdb"
        with Recorder(path, share=False) as recorder:
            assert all([f.result() for f in [recorder.call(c) for c in made]])
        with open_reader(path) as reader:
            assert [repr(c) for c in reader.calls(wire=True)] == by_request(made)
            prompts = reader.sql("SELECT call_id, prompt_token_ids FROM calls_full").to_pylist()
            assert {p["call_id"]: p["prompt_token_ids"] for p in prompts} == {
                c.call_id: c.prompt_token_ids for c in made
            }
            one = made[0]
            assert repr(reader.call(one.call_id)) == repr(one)
            assert reader.prompt(one.call_id) == one.prompt_token_ids


def test_the_other_records(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    rollout = Rollout(
        "r1",
        "g",
        "t",
        3,
        "claude-code",
        "2.0",
        ["claude", "-p", "it's"],
        engine="e",
        model="m",
        keep_reasoning="always",
        forked_from="r0/c0",
        started_at=1.5,
    )
    ended = Rollout(**{f: getattr(rollout, f) for f in rollout.__struct_fields__})
    ended.status, ended.stop_reason, ended.exit_code, ended.ended_at = "failed", "deadline", 7, 2.5
    other = Rollout("r2", status="completed", started_at=9.0)
    reward = Reward("r1", "tests", 0.5, "pytest", "3 of 6", 3.0)
    events = [
        EgressEvent("r1", 1.0, "refused", "dns", "x.org"),
        EgressEvent("r2", 2.0, "stubbed", "path", "GET h/p"),
    ]
    with Recorder(path) as recorder:
        first = recorder.rollout(rollout)
        last = [recorder.rollout(ended), recorder.rollout(other), recorder.reward(reward)]
        for event in events:
            recorder.egress(event)
        assert first.result() and all([f.result() for f in last])
        with open_reader(path) as reader:
            assert reader.rollouts() == [ended, other]
    with open_reader(path) as reader:
        assert reader.rollouts() == [ended, other]
        assert reader.rewards() == [reward]
        assert reader.egress() == events
        assert reader.egress("r2") == events[1:]


def test_a_deep_chain(tmp_path: Path) -> None:
    """500 calls on top of each other, whole again by the reader, the view and the macro; stored linearly."""
    path = tmp_path / "s.duckdb"
    made = conversation(500)
    with Recorder(path, share=False) as recorder:
        assert all([f.result() for f in [recorder.call(c) for c in made]])
    with open_reader(path) as reader:
        assert reader.calls("r1") == made
        by_view = (
            reader.sql("SELECT prompt_token_ids FROM call_prompts ORDER BY call_id").column(0).to_pylist()
        )
        assert by_view == [c.prompt_token_ids for c in made]
        by_macro = reader.sql("FROM prompt_of('c0499')")["prompt_token_ids"][0].as_py()
        assert by_macro == made[-1].prompt_token_ids == reader.prompt("c0499")
        stored = reader.sql("SELECT sum(len(prompt_suffix)) AS n FROM stored_calls")["n"][0].as_py()
        assert stored == 50 + 499 * 7


def test_the_longest_common_prefix_is_the_parent(tmp_path: Path) -> None:
    made = [
        call("a", [1, 2, 3], [4, 5], seq=0),
        call("b", [1, 2, 3, 4, 5, 6], [7], seq=1),  # extends a
        call("c", [1, 2, 3, 4, 9], [8], seq=2),  # forks inside a's completion
        call("d", [1, 2, 3, 4, 5, 6], [7, 8], seq=3),  # a retry of b
        call("e", [1, 2, 3, 4, 9, 8, 6], [], seq=4),  # extends c
        call("f", [12, 2], [1], seq=5),  # shares a digit, no id
        call("g", [1, 2], [], seq=6),  # a beginning of them all
        call("h", [], [], seq=7),
    ]
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        assert all([f.result() for f in [recorder.call(c) for c in made]])
    with open_reader(path) as reader:
        rows = reader.sql("SELECT call_id, prompt_shared FROM stored_calls ORDER BY call_id").to_pylist()
        assert [r["prompt_shared"] for r in rows] == [0, 5, 4, 6, 6, 0, 2, 0]
        assert reader.calls() == made


def test_a_second_process_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    made = conversation(8)
    for part in (made[:3], made[3:4], made[4:]):
        with Recorder(path, share=False) as recorder:
            assert all([f.result() for f in [recorder.call(c) for c in part]])
    with open_reader(path) as reader:
        assert reader.calls() == made
        shared = reader.sql("SELECT prompt_shared FROM stored_calls ORDER BY call_id").column(0).to_pylist()
        assert shared == [0] + [len(c.prompt_token_ids) + 3 for c in made[:-1]]


def test_calls_are_found_by_either_end_of_their_id(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    with Recorder(path, share=False) as recorder:
        for name in ("01AAXY", "01ABXZ", "01AB"):
            recorder.call(call(name))
    with open_reader(path) as reader:
        found = [reader.call(text) for text in ("XY", "01AA", "01AB")]
        assert [c and c.call_id for c in found] == ["01AAXY", "01AAXY", "01AB"]
        assert reader.call("nope") is None
        with pytest.raises(Exception, match="01AAXY, 01AB"):
            reader.call("01A")


def test_raw_bodies_of_a_session_take_the_room_of_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    made = conversation(40)
    body = b'{"system": "' + bytes(range(97, 123)) * 2000 + b'", "messages": ['
    for i, c in enumerate(made):
        body += b'{"content": "turn %d"}, ' % i
        c.wire = Wire("POST", request_body=body + b'], "stream": true}')
        c.upstream_body = body[::-1]
    with Recorder(path, share=False) as recorder:
        assert all([f.result() for f in [recorder.call(c) for c in made]])
    with open_reader(path) as reader:
        assert reader.calls(wire=True) == made
        assert reader.call(made[37].call_id) == made[37]
        stored = reader.sql("SELECT sum(octet_length(request_body)) AS n FROM wire")["n"][0].as_py()
        assert stored < 0.01 * sum(len(c.wire.request_body) for c in made)


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.duckdb"
    odd = call("c", error="half \ud83d", notes=["\udc00"], sampling=Sampling(stop=["\ud800"]))
    odd.wire.request_headers = [("x", "\ud800y")]
    odd.answer = Message("assistant", [TextPart("\ud800 said")])
    with Recorder(path, share=False) as recorder:
        assert recorder.call(odd).result()
    with open_reader(path) as reader:
        (found,) = reader.calls(wire=True)
    assert (found.error, found.notes, found.sampling.stop) == ("half ?", ["?"], ["?"])
    assert found.wire.request_headers == [("x", "?y")]
    assert found.answer == Message("assistant", [TextPart("? said")])


def test_compaction_keeps_everything_and_leaves_integer_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polar_mitm.store.writer._MAX_WAL_BYTES", 20_000)
    path = tmp_path / "s.duckdb"
    made = conversation(60)
    with Recorder(path) as recorder:
        assert all([recorder.call(c).result() for c in made])
        with open_reader(path) as reader:
            assert reader.calls() == made
            assert reader.sql("SELECT count(*) AS n FROM call_rows")["n"][0].as_py() > 0
    with duckdb.connect(str(path), read_only=True) as con:
        kinds = con.execute(
            "SELECT DISTINCT typeof(prompt_suffix), typeof(behaviour_logprobs) FROM call_rows"
        )
        assert kinds.fetchall() == [("INTEGER[]", "FLOAT[]")]
        assert con.execute("SELECT count(*) FROM call_log").fetchone() == (0,)
    with open_reader(path) as reader:
        assert reader.calls() == made
