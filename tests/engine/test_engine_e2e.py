"""The real engine: installed into the cache if need be, started, asked, stopped."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from polar_mitm import engine
from polar_mitm.engine import EngineState, state

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def running() -> Iterator[EngineState]:
    """The managed engine with the default model; one that ran before is left running."""
    before = engine.status()
    yield engine.up(on_step=print)  # waits for one that is just starting
    if before is None:
        stopped = engine.down()
        assert stopped is not None
        assert state.members(stopped) == []
        assert not engine.healthy(stopped.url)


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def _stream(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body | {"stream": True}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        lines = [line.removeprefix(b"data: ").strip() for line in response if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def _prompt(running: EngineState, messages: list[dict[str, Any]], **rest: Any) -> str:
    """The text that the engine's model would see."""
    asked = {"model": running.served_model_name, "messages": messages, **rest}
    tokens = _post(running.url, "/tokenize", asked)["tokens"]
    text = _post(running.url, "/detokenize", {"model": running.served_model_name, "tokens": tokens})
    return str(text["prompt"])


def test_every_sampled_token_streams_with_its_id_and_logprob(running: EngineState) -> None:
    chunks = _stream(
        running.url,
        {
            "model": running.served_model_name,
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "tools": [_TOOL],
            "tool_choice": "required",
            "max_tokens": 48,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": 0,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        },
    )
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ids = [token for choice in choices for token in choice.get("token_ids") or []]
    entries = [
        entry for choice in choices if choice.get("logprobs") for entry in choice["logprobs"]["content"]
    ]
    usage = chunks[-1]["usage"]
    prompt = next(chunk["prompt_token_ids"] for chunk in chunks if chunk.get("prompt_token_ids"))
    assert len(ids) == len(entries) == usage["completion_tokens"] > 0
    assert len(prompt) == usage["prompt_tokens"]
    assert all(entry["logprob"] <= 0 for entry in entries)
    assert any(choice["delta"].get("tool_calls") for choice in choices)


def test_the_default_model_knows_something(running: EngineState) -> None:
    answer = _post(
        running.url,
        "/v1/chat/completions",
        {
            "model": running.served_model_name,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 24,
            "temperature": 0.0,
        },
    )
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_its_window_holds_a_harness(running: EngineState) -> None:
    # vLLM does not start with a window that its KV cache cannot hold.
    assert running.max_model_len == 32_768


def test_its_template_renders_whole_conversations(running: EngineState) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    text = _prompt(
        running,
        [
            {"role": "system", "content": [{"type": "text", "text": "S1"}, {"type": "text", "text": "S2"}]},
            {"role": "user", "content": [{"type": "text", "text": "U1"}, {"type": "text", "text": "U2"}]},
            {"role": "user", "content": "U3"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "R1"}]},
            {"role": "system", "content": "S3"},
        ],
        tools=[_TOOL],
    )
    head, _, rest = text.partition("<|im_end|>\n")
    assert head.startswith("<|im_start|>system\nS1\nS2\n\n# Tools")
    assert '"name": "get_weather"' in head
    assert rest == (
        "<|im_start|>user\nU1\nU2<|im_end|>\n"
        "<|im_start|>user\nU3<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nR1\n</tool_response><|im_end|>\n"
        "<|im_start|>system\nS3<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_weights_cannot_be_changed_from_outside(running: EngineState) -> None:
    """Without dev mode its endpoints do not exist."""
    assert running.dev is False
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _post(running.url, "/collective_rpc", {"method": "reload_weights"})
