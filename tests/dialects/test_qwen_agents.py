"""Qwen Code says in the body who asks: its main agent, one that the model spawned, or one of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.dialects.roles import caller
from polar_mitm.types import Caller

SESSION = "216e603b-eaf5-43d1-aa2f-0d0d59ab9cd5"
SPAWNED = "general-purpose-call_01M7WX3NCFAQN0Z93M9QRH32B0_1"
TOOL = {"type": "function", "function": {"name": "read_file", "parameters": {"type": "object"}}}


def who(
    metadata: Any, agent: str = "QwenCode/0.24.4 (linux; x64)", tools: tuple[Any, ...] = (TOOL,)
) -> Caller:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": list(tools),
        "metadata": metadata,
    }
    headers = {"user-agent": agent}
    request = DIALECTS["openai_chat"].decode(json.dumps(body).encode(), headers, "/v1/chat/completions")
    return caller(headers, request)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("#######", Caller("main")),
        (SPAWNED, Caller("subagent", SPAWNED)),
        (
            "managed-auto-memory-extractor-0a1192ca",
            Caller("auxiliary", "managed-auto-memory-extractor-0a1192ca"),
        ),
        ("x" * 300, Caller("subagent", "x" * 200)),
    ],
)
def test_the_prompt_id_says_who_asks(name: str, expected: Caller) -> None:
    assert who({"sessionId": SESSION, "promptId": f"{SESSION}#{name}#3"}) == expected


def test_a_compaction_or_a_side_question_of_a_subagent_keeps_its_id() -> None:
    assert who({"promptId": f"{SESSION}#{SPAWNED}#3"}, tools=()) == Caller("auxiliary", SPAWNED)


@pytest.mark.parametrize(
    "metadata", [None, {}, [], "a#b#1", {"promptId": 3}, {"promptId": "a#b"}, {"promptId": ""}]
)
def test_other_metadata_says_nothing(metadata: Any) -> None:
    assert who(metadata) == Caller("main")


def test_only_qwen_code_means_it_so() -> None:
    assert who({"promptId": "a#b#1"}, agent="somebody/1") == Caller("main")
