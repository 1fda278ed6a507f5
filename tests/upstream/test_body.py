"""The body that an engine gets: what was asked, and nothing that breaks it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from polar_mitm.types import (
    ChatRequest,
    ImagePart,
    Message,
    Part,
    Sampling,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)
from polar_mitm.upstream.engine import EngineInfo
from polar_mitm.upstream.vllm import build_body

BLIND = EngineInfo("http://engine", "tiny", max_model_len=4096)
SEEING = msgspec.structs.replace(BLIND, images=True)
OURS = Sampling(1.0, 1.0, 0)
USER = Message("user", [TextPart("go")])
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
PIXEL = ImagePart("data:image/png;base64,AAAA")


def body(
    *messages: Message, sampling: Sampling = OURS, engine: EngineInfo = BLIND, **fields: Any
) -> dict[str, Any]:
    request = ChatRequest("claude-x", list(messages or (USER,)), **fields)
    result: dict[str, Any] = msgspec.json.decode(build_body(request, sampling, engine))
    return result


def test_every_request_asks_for_ids_logprobs_and_usage_of_a_stream() -> None:
    for stream in (False, True):
        assert body(stream=stream) == {
            "model": "tiny",
            "messages": [{"role": "user", "content": "go"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }


def test_sampling_is_what_was_decided_not_what_was_asked() -> None:
    decided = Sampling(0.7, 0.9, 20, 99, ["END", "\n"])
    sent = body(sampling=decided)
    assert sent["temperature"] == 0.7 and sent["top_p"] == 0.9 and sent["top_k"] == 20
    assert sent["max_tokens"] == 99 and sent["stop"] == ["END", "\n"]
    harness_wants = ChatRequest("claude-x", [USER], sampling=Sampling(0.0, 0.1, 5, 7, ["asked"]))
    assert msgspec.json.decode(build_body(harness_wants, OURS, BLIND)) == body()


def test_never_a_seed() -> None:
    # vLLM on CPUs dies of a seed when a prompt is prefilled in chunks.
    sent = body(tools=[Tool("f")], tool_choice=ToolChoice("required"), response_schema=SCHEMA)
    assert "seed" not in sent


MESSAGES: list[tuple[str, Message, dict[str, Any]]] = [
    ("system", Message("system", [TextPart("be good")]), {"role": "system", "content": "be good"}),
    (
        "parts are lines",
        Message("user", [TextPart("a"), TextPart("b")]),
        {"role": "user", "content": "a\nb"},
    ),
    ("nothing said", Message("user"), {"role": "user", "content": ""}),
    (
        "tool result",
        Message("tool", [TextPart("ok")], tool_call_id="t1"),
        {"role": "tool", "content": "ok", "tool_call_id": "t1"},
    ),
    (
        "tool result without an id",
        Message("tool", [TextPart("ok")]),
        {"role": "tool", "content": "ok", "tool_call_id": ""},
    ),
    (
        "reasoning",
        Message("assistant", [TextPart("four")], reasoning="2+2"),
        {"role": "assistant", "content": "four", "reasoning": "2+2"},
    ),
    (
        "calls without text",
        Message("assistant", tool_calls=[ToolCall("t1", "Bash", '{"b": 1,  "a":2}')]),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "Bash", "arguments": '{"b": 1,  "a":2}'},
                }
            ],
        },
    ),
]


@pytest.mark.parametrize(("message", "wire"), [m[1:] for m in MESSAGES], ids=[m[0] for m in MESSAGES])
def test_messages(message: Message, wire: dict[str, Any]) -> None:
    assert body(message)["messages"] == [wire]


def test_text_next_to_calls_stays() -> None:
    call = ToolCall("t1", "Bash", "{}")
    sent = body(Message("assistant", [TextPart("I will")], tool_calls=[call, call]))["messages"][0]
    assert sent["content"] == "I will"
    assert len(sent["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("call", "name", "arguments"),
    [
        (ToolCall("1", "f", '{"a":1}'), "f", '{"a":1}'),
        (ToolCall("1", "f", ""), "f", "{}"),
        (ToolCall("1", "f", "  \n"), "f", "{}"),
        (ToolCall("1", "f", '{"a":'), "f", '{"__raw":"{\\"a\\":"}'),
        (ToolCall("1", "f", "[1]"), "f", '{"__raw":"[1]"}'),
        (ToolCall("1", "f", '"text"'), "f", '{"__raw":"\\"text\\""}'),
        (ToolCall("1", "f", "null"), "f", '{"__raw":"null"}'),
        (ToolCall("1", "apply_patch", 'a "b"\n', kind="custom"), "apply_patch", '{"input":"a \\"b\\"\\n"}'),
        (ToolCall("1", "apply_patch", "", kind="custom"), "apply_patch", '{"input":""}'),
        (ToolCall("1", "read", "{}", namespace="mcp__fs"), "mcp__fs__read", "{}"),
        (ToolCall("1", "read", "{}", namespace="functions"), "read", "{}"),
    ],
)
def test_calls_of_the_history_have_objects_for_arguments(call: ToolCall, name: str, arguments: str) -> None:
    sent = body(Message("assistant", tool_calls=[call]))["messages"][0]["tool_calls"][0]
    assert sent["function"] == {"name": name, "arguments": arguments}
    assert isinstance(msgspec.json.decode(arguments), dict)


def test_arguments_nested_too_deeply_stay_text() -> None:
    deep = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    sent = body(Message("assistant", tool_calls=[ToolCall("1", "f", deep)]))["messages"][0]["tool_calls"][0]
    assert msgspec.json.decode(sent["function"]["arguments"]) == {"__raw": deep}


IMAGES: list[tuple[list[Part], list[dict[str, Any]], str]] = [
    (
        [TextPart("see"), PIXEL, TextPart("?")],
        [
            {"type": "text", "text": "see"},
            {"type": "image_url", "image_url": {"url": PIXEL.url}},
            {"type": "text", "text": "?"},
        ],
        "see\n[image]\n?",
    ),
    ([PIXEL], [{"type": "image_url", "image_url": {"url": PIXEL.url}}], "[image]"),
]


@pytest.mark.parametrize(("parts", "seen", "blind"), IMAGES)
def test_images_reach_only_engines_that_read_them(
    parts: list[Part], seen: list[dict[str, Any]], blind: str
) -> None:
    message = Message("user", parts)
    assert body(message, engine=SEEING)["messages"][0]["content"] == seen
    assert body(message)["messages"][0]["content"] == blind


def test_text_without_images_is_a_string_for_every_engine() -> None:
    assert body(engine=SEEING)["messages"] == body()["messages"]


def test_tools() -> None:
    tools = [
        Tool("Bash", "run it", SCHEMA),
        Tool("read", namespace="mcp__fs"),
        Tool("exec", "free text", {"type": "object"}, kind="custom", grammar="start: /.*/"),
    ]
    sent = body(tools=tools)
    assert [t["function"]["name"] for t in sent["tools"]] == ["Bash", "mcp__fs__read", "exec"]
    assert all(t["type"] == "function" for t in sent["tools"])
    assert sent["tools"][0]["function"] == {"name": "Bash", "description": "run it", "parameters": SCHEMA}
    assert sent["tool_choice"] == "auto"


@pytest.mark.parametrize(
    ("choice", "wire"),
    [
        (ToolChoice("auto"), "auto"),
        (ToolChoice("none"), "none"),
        (ToolChoice("required"), "required"),
        (ToolChoice("tool", "mcp__fs__read"), {"type": "function", "function": {"name": "mcp__fs__read"}}),
    ],
)
def test_tool_choice(choice: ToolChoice, wire: Any) -> None:
    sent = body(tools=[Tool("read", namespace="mcp__fs")], tool_choice=choice)
    assert sent["tool_choice"] == wire
    # A call that must come has the arguments that the tool asks for.
    forced = choice.mode in ("required", "tool")
    assert [tool["function"].get("strict", False) for tool in sent["tools"]] == [forced]
    assert "tool_choice" not in body(tool_choice=choice)  # engines refuse a choice among nothing


@pytest.mark.parametrize(("asked", "sent"), [(None, None), (True, None), (False, False)])
def test_parallel_calls_are_only_ever_forbidden(asked: bool | None, sent: bool | None) -> None:
    assert body(tools=[Tool("f")], parallel_tool_calls=asked).get("parallel_tool_calls") is sent
    assert "parallel_tool_calls" not in body(parallel_tool_calls=asked)


def test_response_schema() -> None:
    sent = body(response_schema=SCHEMA)["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["schema"] == SCHEMA
    assert "response_format" not in body()
