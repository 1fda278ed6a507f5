"""Gemini calls from the engine's bytes to the harness's, and their records."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.asking import UpstreamRequest
from polar_mitm.config import Settings
from polar_mitm.conformance.scripts import Answer
from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.ids import minted, sibling
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.errors import PolarError
from polar_mitm.exchange import Exchange
from polar_mitm.sse import SSEDecoder
from polar_mitm.types import Wire
from polar_mitm.upstream.engine import EngineInfo
from tests.support.engine_bytes import events, sampled, split

ENGINE = EngineInfo("http://engine", "tiny", max_model_len=4096, policy_version="tiny@7")
CALL = "01JD0Z6Q3WAAAAAAAAAAAAAAAZ"
METHODS = ["streamGenerateContent?alt=sse", "streamGenerateContent", "generateContent"]
ASK: dict[str, Any] = {
    "contents": [{"role": "user", "parts": [{"text": "go"}]}],
    "tools": [{"functionDeclarations": [{"name": "shell"}]}],
}
MANY = Answer(
    text="one",
    tokens_per_chunk=2,
    others=[
        Answer(text="the second", reasoning="hm"),
        Answer(tool_calls=[("shell", '{"command": "ls"}'), ("shell", '{"comm')]),
    ],
)


def begun(method: str, ask: Any = ASK, **config: Any) -> tuple[Exchange, UpstreamRequest]:
    exchange = Exchange(
        DIALECTS["gemini"], ENGINE, Settings(), rollout_id="r", seq=0, call_id=CALL, clock=lambda: 1000.0
    )
    body = json.dumps(ask | {"generationConfig": config}).encode()
    step = exchange.start(Wire("POST", "host", f"/v1beta/models/gemini-x:{method}", [], body), {})
    assert isinstance(step, UpstreamRequest)
    if step.stream:
        exchange.open()
    return exchange, step


def answered(exchange: Exchange, chunks: list[bytes]) -> bytes:
    out = b"".join(map(exchange.feed, chunks))
    end = exchange.finish()
    return out + (end.body if isinstance(end, Reply) else end)


def candidates(wire: bytes) -> list[dict[str, Any]]:
    """The candidates of all chunks of an answer in any form."""
    if wire.startswith(b"data: "):
        bodies = [json.loads(event.data) for event in SSEDecoder().feed(wire)]
    else:
        body = json.loads(wire)
        bodies = body if isinstance(body, list) else [body]
    return [candidate for body in bodies for candidate in body["candidates"]]


@pytest.mark.parametrize("method", METHODS)
def test_each_candidate_is_a_record_of_its_own(method: str) -> None:
    exchange, step = begun(method, candidateCount=3)
    assert json.loads(step.body)["n"] == 3
    wire = answered(exchange, events(MANY, n=3))
    got = candidates(wire)
    for number, answer in enumerate([MANY, *MANY.others]):
        parts = [p for c in got if c["index"] == number for p in c["content"]["parts"]]
        assert "".join(p.get("text", "") for p in parts if not p.get("thought")) == answer.text
        assert not any(p.get("thought") for p in parts)
    calls = exchange.records(delivered=True)
    assert [c.call_id for c in calls] == [sibling(CALL, k) for k in range(3)]
    assert [c.completion_token_ids for c in calls] == [
        [t.token_id for t in sampled(a)] for a in (MANY, *MANY.others)
    ]
    assert calls[0].wire.response_body == wire and calls[0].route.endswith(f"gemini-x:{method.split('?')[0]}")
    called = [p["functionCall"] for c in got for p in c["content"]["parts"] if "functionCall" in p]
    assert [c["id"] for c in called] == [minted("call", sibling(CALL, 2), n) for n in range(2)]
    assert [c["args"] for c in called] == [
        {"command": "ls"}, {"__unparsedToolInput": {"raw": '{"comm', "len": 6}}
    ]  # fmt: skip


@given(st.lists(st.integers(0, 100_000), max_size=20), st.sampled_from(METHODS))
def test_any_split_gives_the_same_bytes_and_records(cuts: list[int], method: str) -> None:
    def run(chunks: list[bytes]) -> tuple[bytes, Any]:
        exchange, _ = begun(method, candidateCount=3, thinkingConfig={"includeThoughts": True})
        out = answered(exchange, chunks)
        calls = exchange.records(delivered=True)
        calls[0].wire.chunk_sizes, calls[0].wire.chunk_at_ms = [], []
        return out, msgspec.to_builtins(calls, enc_hook=list)

    data = b"".join(events(MANY, n=3))
    assert run(split(data, cuts)) == run([data])


def test_an_array_is_whole_only_when_recorded() -> None:
    exchange, _ = begun("streamGenerateContent")
    before = b"".join(map(exchange.feed, events(MANY)))
    end = exchange.finish()
    assert isinstance(end, bytes) and end.endswith(b"]")
    with pytest.raises(json.JSONDecodeError):
        json.loads(before)
    assert json.loads(before + end)[-1]["candidates"][0]["finishReason"] == "STOP"
    headers = dict(exchange.records(delivered=True)[0].wire.response_headers)
    assert headers["content-type"].startswith("application/json")


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("num_chunks", [0, 2, 4])
def test_an_array_that_breaks_is_still_json(num_chunks: int, opened: bool) -> None:
    exchange, _ = begun("streamGenerateContent")
    out = exchange.opening() + exchange.keepalive() if opened else b""
    out += b"".join(map(exchange.feed, events(MANY)[:num_chunks]))
    end = exchange.fail(PolarError("upstream", "gone"))
    assert isinstance(end, bytes)
    *chunks, last = json.loads(out + end)
    assert last["error"]["code"] == 500 and all("candidates" in chunk for chunk in chunks)
    assert exchange.records(delivered=False)[0].status == "failed"


def test_structured_output_is_guided() -> None:
    schema = {"type": "OBJECT", "properties": {"x": {"type": "INTEGER"}}}
    ask = {"contents": ASK["contents"]}
    exchange, step = begun("generateContent", ask, responseMimeType="application/json", responseSchema=schema)
    guided = json.loads(step.body)["response_format"]["json_schema"]["schema"]
    assert guided == {"type": "object", "properties": {"x": {"type": "integer"}}}
    assert "guided:json_schema" in exchange.call.notes


def test_logprobs_are_shown_to_who_asks() -> None:
    exchange, step = begun("generateContent", responseLogprobs=True, logprobs=2)
    wire = answered(exchange, events(MANY, **json.loads(step.body)))
    (candidate,) = candidates(wire)
    recorded = exchange.records(delivered=True)[0].behaviour_logprobs
    shown = candidate["logprobsResult"]
    assert [t["logProbability"] for t in shown["chosenCandidates"]] == recorded
    assert all(len(top["candidates"]) == 2 for top in shown["topCandidates"])
    assert len(shown["topCandidates"]) == len(recorded)
    assert candidate["avgLogprobs"] == pytest.approx(sum(recorded) / len(recorded))
