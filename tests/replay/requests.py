"""Recorded calls and live requests, small enough to read."""

from __future__ import annotations

import json
from typing import Any

from polar_mitm.dialects.ids import minted, new_id
from polar_mitm.types import ModelCall, Wire

ANTHROPIC, RESPONSES = "anthropic", "openai_responses"


def wire(body: Any, *, path: str = "/v1/messages?beta=true", **headers: str) -> Wire:
    """A request of an Anthropic client; underscores in header names are hyphens."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    items = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return Wire("POST", "api.anthropic.com", path, [("content-type", "application/json"), *items], raw)


def asking(*turns: Any, model: str = "claude-x", stream: bool = True, **fields: Any) -> dict[str, Any]:
    """A Messages body: strings are the user's, calls are those whose answers the history has."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if isinstance(turn, str):
            messages.append({"role": "user", "content": turn})
            continue
        tool_id = minted("toolu", turn.call_id, 0)
        use = {"type": "tool_use", "id": tool_id, "name": "Bash", "input": {"command": "ls"}}
        result = {"type": "tool_result", "tool_use_id": tool_id, "content": "a b"}
        messages += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    return {"model": model, "max_tokens": 100, "messages": messages, "stream": stream, **fields}


def call(seq: int, body: Any, answer: bytes = b"", **fields: Any) -> ModelCall:
    """A recorded call."""
    asked = wire(body)
    asked.status, asked.response_body = 200, answer
    given = {"status": "ok", "stream": True, **fields}
    return ModelCall(new_id(), "recorded", seq, ANTHROPIC, "POST /v1/messages", wire=asked, **given)
