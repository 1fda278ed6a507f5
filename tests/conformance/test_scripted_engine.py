"""The scripted engine keeps vLLM's promises, so that tests built on it mean something."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import aiohttp
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.conformance import byte_tokens
from polar_mitm.conformance.scripted_engine import ScriptedEngine
from polar_mitm.conformance.scripts import Answer, always, sequence, shell_call, write_file_in_two_turns
from polar_mitm.errors import EngineUnfit
from polar_mitm.upstream.probe import probe
from tests.support.fast_engine import FastEngine

USER = [{"role": "user", "content": "go"}]
ASK = {"logprobs": True, "return_token_ids": True, "stream_options": {"include_usage": True}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


BASH = tool("Bash", command={"type": "string"}, description={"type": "string"})


async def chat(url: str, messages: list[dict[str, Any]] = USER, **fields: Any) -> list[Any]:
    """All SSE payloads of one streaming call; [DONE] as a string."""
    body = {"model": "scripted", "messages": messages, "stream": True, **fields}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status == 200, await answer.text()
        lines = [line async for line in answer.content if line.startswith(b"data: ")]
    return [line[6:].decode().strip() if b"[DONE]" in line else json.loads(line[6:]) for line in lines]


def sampled(events: list[Any]) -> tuple[list[int], list[float]]:
    choices = [event["choices"][0] for event in events if event != "[DONE]" and event["choices"]]
    ids = [i for choice in choices for i in choice.get("token_ids") or []]
    logprobs = [
        t["logprob"] for choice in choices for t in (choice["logprobs"] or {"content": []})["content"]
    ]
    return ids, logprobs


@given(st.text() | st.sampled_from(byte_tokens.SPECIAL))
def test_tokenizer_round_trips(text: str) -> None:
    assert byte_tokens.decode(byte_tokens.encode(text)) == text


async def test_stream_has_vllm_shapes_and_every_token_has_id_and_logprob() -> None:
    answer = Answer(text="hé", reasoning="why", tool_calls=[("Bash", '{"command": "ls"}')])
    async with ScriptedEngine(always(answer)) as engine:
        events = await chat(engine.url, tools=[BASH], **ASK)
        call = engine.calls[0]
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[0]["prompt_token_ids"] == call.prompt_token_ids
    assert events[-2]["choices"] == [] and events[-2]["usage"]["completion_tokens"] == len(
        call.completion_token_ids
    )
    assert events[-3]["choices"][0]["finish_reason"] == "tool_calls"
    ids, logprobs = sampled(events)
    assert ids == call.completion_token_ids == call.sent_token_ids
    assert len(logprobs) == len(ids) and all(p < 0 for p in logprobs)
    deltas = [event["choices"][0]["delta"] for event in events[1:-2]]
    assert {} in deltas, "a parser holds text back while ids go on"
    assert "".join(d.get("content", "") for d in deltas) == "hé"
    assert "".join(d.get("reasoning", "") for d in deltas) == "why"
    arguments = "".join(
        c["function"].get("arguments", "") for d in deltas for c in d.get("tool_calls", []) if c["index"] == 0
    )
    assert arguments == '{"command": "ls"}'
    assert byte_tokens.decode(ids).endswith("</tool_call><|im_end|>")


async def test_next_prompt_extends_this_prompt_and_its_sampled_tokens() -> None:
    async with ScriptedEngine(write_file_in_two_turns("a.txt", "it's é")) as engine:
        client = openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="x")
        history: list[Any] = list(USER)
        first = await client.chat.completions.create(model="scripted", messages=history, tools=[BASH])  # type: ignore[list-item]
        message = first.choices[0].message
        assert message.tool_calls
        history.append(message.model_dump())
        history.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "ok"})
        second = await client.chat.completions.create(model="scripted", messages=history, tools=[BASH])  # type: ignore[list-item]
        one, two = engine.calls
    assert second.choices[0].message.content == "Done."
    cumulative = one.prompt_token_ids + one.completion_token_ids
    assert two.prompt_token_ids[: len(cumulative)] == cumulative
    assert {one.outcome, two.outcome} == {"finished"}


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        (BASH, {"command": "ls -l", "description": "Write the file"}),
        (tool("bash", command={"type": "string"}), {"command": "ls -l"}),
        (tool("exec_command", cmd={"type": "string"}), {"cmd": "ls -l"}),
        (tool("shell", command={"type": "array"}), {"command": ["bash", "-lc", "ls -l"]}),
        (
            tool("run_shell_command", command={"type": "string"}, is_background={"type": "boolean"}),
            {"command": "ls -l", "is_background": False},
        ),
        (
            tool("exec", input={"type": "string"}),
            {"input": 'const r = await tools.exec_command({cmd:"ls -l"}); text(r);'},
        ),
        (
            tool(
                "run_it",
                command={"type": "string"},
                timeout={"anyOf": [{"type": "number"}, {"type": "null"}]},
                retries={"type": ["integer", "null"]},
                mode={"enum": ["fast", "slow"]},
            ),
            {"command": "ls -l", "timeout": None, "retries": None, "mode": "fast"},
        ),
    ],
)
def test_shell_call_fits_each_harness(offered: dict[str, Any], expected: dict[str, Any]) -> None:
    request = {"tools": [tool("Read", path={"type": "string"}), offered]}
    call = shell_call(request, "ls -l")
    assert call is not None
    assert call[0] == offered["function"]["name"] and json.loads(call[1]) == expected


def test_no_shell_no_call() -> None:
    script = write_file_in_two_turns("a", "b")
    assert script({"messages": USER, "tools": [tool("Read", path={"type": "string"})]}, 0).tool_calls == ()


async def test_ids_and_logprobs_only_when_asked_and_never_when_omitted() -> None:
    full = Answer(text="hello")
    lossy = Answer(text="hello", omit_token_ids=True, omit_logprobs=True, omit_prompt_token_ids=True)
    async with ScriptedEngine(sequence(full, lossy)) as engine:
        unasked = await chat(engine.url)
        stripped = await chat(engine.url, **ASK)
    assert sampled(unasked) == sampled(stripped) == ([], [])
    assert "prompt_token_ids" not in unasked[0] and "prompt_token_ids" not in stripped[0]


async def test_faults_in_the_stream() -> None:
    text = "0123456789"
    script = sequence(
        Answer(text=text, garbage_after_tokens=4),
        Answer(text=text, error_after_tokens=4),
        Answer(text=text, break_after_tokens=4),
    )
    async with ScriptedEngine(script) as engine:
        with pytest.raises(json.JSONDecodeError):
            await chat(engine.url, **ASK)
        events = await chat(engine.url, **ASK)
        assert events[-2]["error"]["code"] == 500 and events[-1] == "[DONE]"
        with pytest.raises(aiohttp.ClientPayloadError):
            await chat(engine.url, **ASK)
        assert [call.outcome for call in engine.calls] == ["finished", "broken", "broken"]
        assert byte_tokens.decode(engine.calls[2].sent_token_ids) == "0123"


async def test_a_client_that_hangs_up_cancels_the_call() -> None:
    async with ScriptedEngine(always(Answer(text="x" * 1000, chunk_delay_s=0.01))) as engine:
        body = {"messages": USER, "stream": True}
        async with aiohttp.ClientSession() as session:
            answer = await session.post(f"{engine.url}/v1/chat/completions", json=body)
            await answer.content.readany()
            answer.close()
        call = engine.calls[0]
        await asyncio.wait_for(call.ended.wait(), 10)
    assert call.outcome == "cancelled"
    assert len(call.sent_token_ids) < len(call.completion_token_ids)


async def test_errors_before_the_first_byte() -> None:
    busy = Answer(status=503, headers={"retry-after": "7"})
    async with ScriptedEngine(always(busy), max_model_len=200) as engine, aiohttp.ClientSession() as session:
        url = f"{engine.url}/v1/chat/completions"
        async with session.post(url, json={"messages": USER}) as answer:
            assert answer.status == 503 and answer.headers["retry-after"] == "7"
            assert (await answer.json())["error"]["code"] == 503
        async with session.post(url, json={"messages": USER, "model": "other"}) as answer:
            assert answer.status == 404
        async with session.post(url, json={"messages": [{"role": "user", "content": "x" * 300}]}) as answer:
            assert answer.status == 400 and "maximum context length" in await answer.text()
        async with session.post(url, data=b"{") as answer:
            assert answer.status == 400
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        async with session.post(url, json={"messages": [{"role": "user", "content": [picture]}]}) as answer:
            assert answer.status == 400 and "not a multimodal model" in await answer.text()


async def test_length_cuts_the_answer() -> None:
    async with ScriptedEngine(always(Answer(text="0123456789"))) as engine:
        events = await chat(engine.url, max_tokens=3, **ASK)
    assert events[-3]["choices"][0]["finish_reason"] == "length"
    assert byte_tokens.decode(sampled(events)[0]) == "012"


async def test_given_prompt_ids_replace_the_rendered_prompt() -> None:
    async with ScriptedEngine() as engine:
        events = await chat(engine.url, kv_transfer_params={"prompt_token_ids": [17, 18]}, **ASK)
    assert events[0]["prompt_token_ids"] == [17, 18]


async def test_several_answers_by_index_streamed_and_whole() -> None:
    answer = Answer(text="one", others=[Answer(text="two", tool_calls=[("Bash", "{}")])])
    async with ScriptedEngine(always(answer)) as engine:
        client = openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="x")
        events = await chat(engine.url, n=3, **ASK)
        whole = await client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "go"}], n=3, logprobs=True, top_logprobs=3
        )
        call = engine.calls[0]
    said = ["", "", ""]
    for choice in (c for event in events[:-1] for c in event["choices"]):
        said[choice["index"]] += choice["delta"].get("content") or ""
    assert said == [choice.message.content for choice in whole.choices] == ["one", "two", "one"]
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "tool_calls", "stop"]
    assert [event.get("prompt_token_ids") for event in events[:3]] == [call.prompt_token_ids] * 3
    sent = sum(map(len, [call.completion_token_ids, *call.other_token_ids]))
    assert events[-2]["usage"]["completion_tokens"] == sent == whole.usage.completion_tokens  # type: ignore[union-attr]
    for place in whole.choices[1].logprobs.content:  # type: ignore[union-attr]
        assert place.top_logprobs[0].token == place.token and len(place.top_logprobs) == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"n": 0}, "at least 1"), ({"n": 2, "temperature": 0}, "greedy"), ({"top_logprobs": 21}, "max allowed")],
)
async def test_what_vllm_refuses(fields: dict[str, Any], words: str) -> None:
    async with ScriptedEngine() as engine, aiohttp.ClientSession() as session:
        body = {"messages": USER, **fields}
        async with session.post(f"{engine.url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 400 and words in (await answer.json())["error"]["message"]


async def test_side_endpoints() -> None:
    async with ScriptedEngine() as engine, aiohttp.ClientSession() as session:
        async with session.get(f"{engine.url}/v1/models") as answer:
            assert (await answer.json())["data"][0]["id"] == "scripted"
        async with session.get(f"{engine.url}/version") as answer:
            assert (await answer.json())["version"] == "0.32.0"
        async with session.get(f"{engine.url}/health") as answer:
            assert answer.status == 200
        async with session.post(f"{engine.url}/tokenize", json={"messages": USER}) as answer:
            ids = (await answer.json())["tokens"]
        async with session.post(f"{engine.url}/detokenize", json={"tokens": ids}) as answer:
            assert (await answer.json())["prompt"] == byte_tokens.render(USER)


@pytest.mark.parametrize("chunk_delay_s", [0.0, 0.001])
async def test_fast_engine_streams_its_tokens_over_kept_connections(chunk_delay_s: float) -> None:
    async with FastEngine(num_tokens=5, num_prompt_tokens=7, chunk_delay_s=chunk_delay_s) as engine:
        for _ in range(2):
            events = await chat(engine.url, **ASK)
            assert len(events[0]["prompt_token_ids"]) == 7
            ids, logprobs = sampled(events)
            assert len(ids) == len(logprobs) == 5
            assert events[-2]["usage"]["completion_tokens"] == 5 and events[-1] == "[DONE]"
        assert engine.num_calls == 2
        assert (await probe(engine.url)).model == "scripted"


@pytest.mark.parametrize("module", ["polar_mitm.conformance.scripted_engine", "tests.support.fast_engine"])
async def test_command_line_prints_its_url_and_answers(module: str) -> None:
    command = [sys.executable, "-m", module]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        assert (await chat(url, **ASK))[-1] == "[DONE]"
    finally:
        process.terminate()
        await process.wait()


async def test_the_start_up_probe_accepts_it_and_refuses_it_when_it_loses_tokens() -> None:
    async with ScriptedEngine() as engine:
        assert (await probe(engine.url)).model == "scripted"
    for loss in ("omit_token_ids", "omit_logprobs", "omit_prompt_token_ids"):
        async with ScriptedEngine(always(Answer(**{loss: True}))) as engine:
            with pytest.raises(EngineUnfit):
                await probe(engine.url)
