"""Real harnesses' own traffic, decoded, translated, answered again byte for byte, and read by official SDKs.

The fixtures and their golden files: `fixtures/recorded/README.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import msgspec
import openai
import pytest
from google import genai
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.custom_tool import unwrap
from polar_mitm.dialects.ids import call_id_of
from polar_mitm.types import Message, TextPart, ToolCall
from tests.dialects import chat_sdk, gemini_sdk, responses_sdk
from tests.dialects.test_anthropic_answer import client as anthropic_client
from tests.support import recorded
from tests.support.engine_bytes import split
from tests.support.record_fixtures import HARNESSES, SCENARIOS
from tests.support.recorded import Call, Run
from tests.support.scrub import BILLING, FILLER, GRAMMAR

RUNS = recorded.runs()
CALLS = [(run, call) for run in RUNS for call in run.calls]
BROKEN = [(run, call) for run, call in CALLS if b"scripted error" in call.engine]


SHELLS = {
    "claude-code": "Bash",
    "codex": "exec_command",
    "codex-lite": "exec",
    "pi": "bash",
    "opencode": "bash",
    "qwen-code": "run_shell_command",
    "gemini-cli": "run_shell_command",
}


def _each(calls: list[tuple[Run, Call]]) -> pytest.MarkDecorator:
    names = [f"{run.folder.name}-{call.number}" for run, call in calls]
    return pytest.mark.parametrize(("run", "call"), calls, ids=names)


each_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.folder.name)
each_call = _each(CALLS)
each_broken = _each(BROKEN)
each_answered = _each([pair for pair in CALLS if pair not in BROKEN])


def test_every_harness_is_recorded_in_every_scenario() -> None:
    assert {(run.harness, run.scenario) for run in RUNS} == {(h, s) for h in HARNESSES for s in SCENARIOS}
    size = sum(path.stat().st_size for path in recorded.FOLDER.rglob("*"))
    assert size < 2_500_000
    assert len(BROKEN) == len(HARNESSES)  # each harness asked again after its broken answer
    assert [call.body["stream"] for run, call in CALLS if run.folder.name == "claude-code-engine-error"] == [
        True, False, True
    ]  # fmt: skip


@each_call
def test_derived_files_are_what_the_code_derives(run: Run, call: Call) -> None:
    """After an intended change: `python -m tests.support.record_fixtures --regenerate`."""
    for name, content in recorded.derive(call):
        assert (run.folder / name).read_bytes() == content, name


@each_call
def test_decodes_to_what_a_person_expects(run: Run, call: Call) -> None:
    request = call.decode()
    assert request.stream == (call.body.get("stream", False) or "stream" in call.path)
    assert request.model == call.body["model"] if "model" in call.body else f"/{request.model}:" in call.path
    prompt = run.said[1 if run.harness == "opencode" else 0]  # opencode puts it in quotes
    assert [m.role for m in request.messages if TextPart(prompt) in m.content] == ["user"]
    roles = [m.role for m in request.messages]
    assert roles[0] == "system" and "system" not in roles[1:]  # chat templates take no other
    assert call.replay().exchange.call.role == ("main" if call in run.thread else "auxiliary")
    names = [tool.engine_name for tool in request.tools]
    assert len(names) == len(set(names))
    if call not in run.thread:
        assert run.harness in ("opencode", "gemini-cli") and names == []
        assert (request.response_schema is not None) == (run.harness == "gemini-cli")  # its router
        return
    assert request.find_tool(SHELLS[run.harness]) is not None
    if run.harness == "claude-code":
        assert {"dropped:billing_header", "moved:system_message"} <= set(request.notes)
        assert not any(BILLING in message.text for message in request.messages)
    elif run.harness == "gemini-cli":
        assert (request.notes, request.show_reasoning) == ([], True)
    elif run.harness == "qwen-code":
        assert (request.notes, request.stream_usage, request.agent) == ([], True, "")
    elif run.harness in ("pi", "opencode"):
        assert request.notes == (["withheld:__pi_deferred_placeholder__"] if run.harness == "pi" else [])
        assert request.show_reasoning == (run.harness == "pi")
    else:
        assert any(tool.namespace for tool in request.tools)
        assert request.show_reasoning == bool(call.body["reasoning"].get("summary"))


@each_call
def test_any_split_of_the_engine_gives_the_same_bytes(run: Run, call: Call) -> None:
    whole = run.read(call, "response")

    @settings(max_examples=15)
    @given(st.lists(st.integers(0, 1 << 20), max_size=200))
    def check(cuts: list[int]) -> None:
        assert call.replay(split(call.engine, cuts)).response == whole

    check()
    assert call.replay(bytes([b]) for b in call.engine).response == whole


@each_run
def test_history_comes_back_as_it_was_answered(run: Run) -> None:
    """What a harness returns of earlier answers decodes to what was sampled, and carries our ids."""
    answered: list[tuple[str, Message]] = []
    for call in run.thread:
        history = [m for m in call.decode().messages if m.role == "assistant"]
        if run.folder.name == "qwen-code-engine-error" and not answered:  # keeps what came before it broke
            kept = [(m.text, m.minted_ids) for m in history]
            assert kept == ([] if call is run.thread[0] else [("I will w", [])])
            history = []
        assert len(history) == len(answered)
        for returned, (call_id, sampled) in zip(history, answered, strict=True):
            assert returned.text == sampled.text
            assert returned.reasoning == sampled.reasoning
            sent = [_unwrapped(c) for c in sampled.tool_calls]
            if run.harness == "qwen-code":  # writes the JSON anew, compact
                sent = [msgspec.structs.replace(c, arguments=_compact(c.arguments)) for c in sent]
            assert returned.tool_calls == sent
            assert {call_id_of(i) for i in returned.minted_ids} == {call_id}
            assert {c.id for c in sampled.tool_calls} <= set(returned.minted_ids)
        replay = call.replay()
        if replay.exchange.call.status == "ok":  # harnesses ask again where it failed
            answered.append((call.call_id, replay.exchange.completion.message))
    assert len(answered) == 2


@each_run
def test_tool_results_name_our_calls(run: Run) -> None:
    last = run.thread[-1].decode().messages
    results = [m.tool_call_id for m in last if m.role == "tool"]
    assert results == [c.id for m in last for c in m.tool_calls]
    assert len(results) == (2 if run.scenario == "parallel" else 1)


@each_answered
def test_official_sdk_rebuilds_the_answer(run: Run, call: Call) -> None:
    replay = call.replay()
    sampled = replay.exchange.completion.message
    text, calls, num_tokens = _READERS[call.dialect](call, replay)
    assert text == sampled.text
    assert num_tokens == len(replay.exchange.completion.completion_token_ids)
    own = [_unwrapped(c) for c in sampled.tool_calls]
    assert calls == [
        (c.id, c.name, c.arguments if c.kind == "custom" else json.loads(c.arguments)) for c in own
    ]


@each_broken
def test_official_sdk_reports_a_broken_engine(run: Run, call: Call) -> None:
    replay = call.replay()
    if call.dialect == "anthropic":
        with pytest.raises(anthropic.APIStatusError, match="scripted error"):
            _anthropic(call, replay)
        return
    if call.dialect == "gemini":
        with pytest.raises(genai.errors.APIError, match="scripted error"):
            _gemini(call, replay)
        return
    if call.dialect == "openai_chat":
        with pytest.raises(openai.APIError, match="scripted error"):
            chat_sdk.streamed(replay.response)
        return
    with responses_sdk.streaming(replay.response).responses.stream(model="m", input="hi") as stream:
        *_, last = stream
    assert last.type == "response.failed"
    assert last.response.error is not None and "scripted error" in last.response.error.message


def _unwrapped(call: ToolCall) -> ToolCall:
    """A call as its harness sees it: a custom tool's arguments are sampled as JSON around its input."""
    text = unwrap(call.arguments) if call.kind == "custom" else call.arguments
    return msgspec.structs.replace(call, arguments=text)


def _compact(arguments: str) -> str:
    return recorded.compact(json.loads(arguments)).decode()


Rebuilt = tuple[str, list[tuple[str, str, Any]], int]


def _anthropic(call: Call, replay: recorded.Replay) -> Rebuilt:
    sdk = anthropic_client(lambda _: (replay.status, replay.headers, replay.response))
    ask: dict[str, Any] = {
        "model": call.body["model"], "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]
    }  # fmt: skip
    if call.body.get("stream"):
        with sdk.messages.stream(**ask) as stream:
            message = stream.get_final_message()
    else:
        message = sdk.messages.create(**ask)
    text = "".join(block.text for block in message.content if block.type == "text")
    calls = [(b.id, b.name, b.input) for b in message.content if b.type == "tool_use"]
    return text, calls, message.usage.output_tokens


def _openai(call: Call, replay: recorded.Replay) -> Rebuilt:
    _, response = responses_sdk.rebuilt(replay.response)
    calls: list[tuple[str, str, Any]] = []
    for item in response.output:
        if item.type == "function_call":
            calls.append((item.call_id, item.name, json.loads(item.arguments)))
        elif item.type == "custom_tool_call":
            calls.append((item.call_id, item.name, item.input))
    assert response.usage is not None
    return response.output_text, calls, response.usage.output_tokens


def _chat(call: Call, replay: recorded.Replay) -> Rebuilt:
    completion = chat_sdk.snapshot(replay.response)
    message = completion.choices[0].message
    calls = [
        (each.id, each.function.name, json.loads(each.function.arguments))
        for each in message.tool_calls or []
        if each.type == "function"
    ]
    assert completion.usage is not None
    return message.content or "", calls, completion.usage.completion_tokens


def _gemini(call: Call, replay: recorded.Replay) -> Rebuilt:
    sdk = gemini_sdk.client(lambda _: Reply(replay.status, replay.response, replay.headers))
    ask: Any = {"model": "m", "contents": "hi"}
    if "stream" in call.path:
        answers = list(sdk.models.generate_content_stream(**ask))
    else:
        answers = [sdk.models.generate_content(**ask)]
    contents = [candidate.content for a in answers for candidate in a.candidates or () if candidate.content]
    parts = gemini_sdk.joined(contents)
    text = "".join(p.text for p in parts if p.text and not p.thought)
    calls = [
        (p.function_call.id, p.function_call.name, p.function_call.args) for p in parts if p.function_call
    ]
    used = answers[-1].usage_metadata
    assert used is not None
    return text, calls, (used.candidates_token_count or 0) + (used.thoughts_token_count or 0)


_READERS = {"anthropic": _anthropic, "openai_responses": _openai, "openai_chat": _chat, "gemini": _gemini}


@each_call
def test_holds_no_text_of_others_and_no_secret(run: Run, call: Call) -> None:
    """Every string with a space in it is our own, or a stand-in."""
    for where, text in _strings(call.body):
        if any(said.startswith(text) for said in run.said) or where == "enum":
            continue
        spaced = any(c.isspace() for c in text)
        if spaced and text != GRAMMAR and not text.startswith((BILLING, "{")):
            assert FILLER.fullmatch(text), (where, text)
        assert len(text) <= 64 or spaced or text.startswith(("cG9sYXI", "Y0c5c1lYS", "{")), (where, text)
    headers = {name.lower(): value for name, value in call.headers}
    secrets = {headers.get(n) for n in ("x-api-key", "x-goog-api-key", "authorization")} - {None}
    assert secrets == {"<redacted>"}


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, where)
