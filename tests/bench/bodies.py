"""The same conversation as a request of each dialect: ten tools and a history, of a wanted size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec

from tests.bench.processes import Side

MODEL = "scripted"

ENDPOINTS: dict[str, tuple[str, str]] = {
    "anthropic": ("api.anthropic.com", "/v1/messages"),
    "openai_responses": ("api.openai.com", "/v1/responses"),
    "openai_chat": ("api.openai.com", "/v1/chat/completions"),
    "gemini": (
        "generativelanguage.googleapis.com",
        f"/v1beta/models/{MODEL}:streamGenerateContent?alt=sse",
    ),
}
"""Where a dialect is spoken: dialect -> host and path."""


def speaking(side: Side, dialect: str, *, name: str = "") -> Side:
    """`side`, asked in a dialect; `name`d for both, unless told."""
    host, path = ENDPOINTS[dialect]
    return replace(side, name=name or f"{side.name} {dialect}", server_name=host, path=path)


def chat_body(num_bytes: int, dialect: str) -> bytes:
    """A conversation of about `num_bytes`; the last word is the user's."""
    tools = [(f"tool_{n}", _DESCRIPTION, _PARAMETERS) for n in range(10)]
    turns = ["Fix the failing test."]
    words = _prose(num_bytes)

    def encoded() -> bytes:
        return msgspec.json.encode(_WIRE[dialect](tools, turns))

    while (size := len(encoded())) < num_bytes:
        start = len(turns) * 1000
        turns.append(words[start : start + max(1, min(1000, num_bytes - size))])
    if len(turns) % 2 == 0:
        turns.append("Go on.")
    return encoded()


def engine_body(num_bytes: int) -> bytes:
    """The conversation as an engine is asked for it when its tokens are to be captured."""
    asked = msgspec.json.decode(chat_body(num_bytes, "openai_chat"))
    return msgspec.json.encode({**asked, "logprobs": True, "return_token_ids": True})


_Tools = list[tuple[str, str, dict[str, Any]]]
_DESCRIPTION = "Runs something in the workspace and returns what it printed. " * 8
_PARAMETERS = {
    "type": "object",
    "properties": {f"parameter_{n}": {"type": "string", "description": "A value."} for n in range(10)},
}


def _prose(num_chars: int) -> str:
    """Text that compresses about as well as prompts do (four to one), always the same."""
    draw = random.Random(0)
    lexicon = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(800)]
    return " ".join(draw.choices(lexicon, k=num_chars // 4))


def _roles(turns: list[str], assistant: str = "assistant") -> Iterator[tuple[str, str]]:
    for n, text in enumerate(turns):
        yield (assistant if n % 2 else "user"), text


def _anthropic(tools: _Tools, turns: list[str]) -> dict[str, Any]:
    return {
        "model": MODEL,
        "stream": True,
        "max_tokens": 4096,
        "tools": [
            {"name": name, "description": text, "input_schema": schema} for name, text, schema in tools
        ],
        "messages": [{"role": role, "content": text} for role, text in _roles(turns)],
    }


def _chat(tools: _Tools, turns: list[str]) -> dict[str, Any]:
    return {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 4096,
        "tools": [
            {"type": "function", "function": {"name": name, "description": text, "parameters": schema}}
            for name, text, schema in tools
        ],
        "messages": [{"role": role, "content": text} for role, text in _roles(turns)],
    }


def _responses(tools: _Tools, turns: list[str]) -> dict[str, Any]:
    return {
        "model": MODEL,
        "stream": True,
        "store": False,
        "max_output_tokens": 4096,
        "tools": [
            {"type": "function", "name": name, "description": text, "parameters": schema, "strict": False}
            for name, text, schema in tools
        ],
        "input": [
            {
                "type": "message",
                "role": role,
                "content": [{"type": "output_text" if role == "assistant" else "input_text", "text": text}],
            }
            for role, text in _roles(turns)
        ],
    }


def _gemini(tools: _Tools, turns: list[str]) -> dict[str, Any]:
    return {
        "generationConfig": {"maxOutputTokens": 4096},
        "tools": [
            {
                "functionDeclarations": [
                    {"name": name, "description": text, "parametersJsonSchema": schema}
                    for name, text, schema in tools
                ]
            }
        ],
        "contents": [{"role": role, "parts": [{"text": text}]} for role, text in _roles(turns, "model")],
    }


_WIRE = {
    "anthropic": _anthropic,
    "openai_responses": _responses,
    "openai_chat": _chat,
    "gemini": _gemini,
}
