"""Through the real dialects: what we answer comes back, and names its call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.dialects.base import Dialect
from polar_mitm.dialects.ids import minted, new_id, seal
from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.lineage import Lineage
from polar_mitm.types import ChatRequest, Completion, Message, ModelCall, TextPart, ToolCall
from tests.lineage.test_properties import answers

ANTHROPIC, RESPONSES = DIALECTS["anthropic"], DIALECTS["openai_responses"]
PARAMETERS = {"type": "object", "properties": {"command": {"type": "string"}}}


def anthropic(history: list[Any], **fields: Any) -> dict[str, Any]:
    tools = [{"name": "bash", "input_schema": PARAMETERS}]
    return {"model": "m", "max_tokens": 9, "messages": history, "tools": tools, **fields}


def responses(history: list[Any], **fields: Any) -> dict[str, Any]:
    tools = [
        {"type": "function", "name": "bash", "parameters": PARAMETERS},
        {"type": "namespace", "name": "functions", "tools": [{"type": "custom", "name": "exec"}]},
    ]
    return {"model": "m", "input": history, "tools": tools, **fields}


def decode(dialect: Dialect, body: dict[str, Any]) -> ChatRequest:
    return dialect.decode(json.dumps(body).encode(), {}, "/")


def anthropic_echo(body: bytes) -> list[Any]:
    """The answer's message as it stands, and results of its tool calls."""
    blocks = json.loads(body)["content"]
    back: list[Any] = [{"role": "assistant", "content": blocks}]
    ids = [block["id"] for block in blocks if block["type"] == "tool_use"]
    return [*back, {"role": "user", "content": [*map(result, ids), {"type": "text", "text": "Go on."}]}]


def result(call_id: str) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": "ok"}


def responses_echo(body: bytes) -> list[Any]:
    """The answer's items as they stand, and outputs of its tool calls."""
    items = json.loads(body)["output"]
    outputs = [
        {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": "ok"}
        for item in items
        if item["type"].endswith("tool_call") or item["type"] == "function_call"
    ]
    return [*items, *outputs, {"role": "user", "content": "Go on."}]


@pytest.mark.parametrize("shown", [True, False], ids=["thinking shown", "thinking hidden"])
@pytest.mark.parametrize("name", ["anthropic", "openai_responses"])
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_verbatim_echo_is_found(name: str, shown: bool, data: st.DataObject) -> None:
    dialect = DIALECTS[name]
    lineage = Lineage()
    history: list[Any] = [{"role": "user", "content": "Do it."}]
    parent_id = None
    for _ in range(3):
        if dialect is ANTHROPIC:
            body = anthropic(history, thinking={"type": "adaptive"} if shown else {"type": "disabled"})
        else:
            body = responses(history, reasoning={"summary": "auto"} if shown else {})
        request = decode(dialect, body)
        found = lineage.find(request)
        assert (found.parent.call_id if found.parent else None) == parent_id
        call = ModelCall(new_id(), "r1", 0, name, "POST /", "ok", finish_reason="stop", delivered=True)
        said, reasoning, tools = data.draw(answers)
        custom = dialect is RESPONSES and data.draw(st.booleans())
        prefix = dialect.tool_id_prefix
        calls = [
            ToolCall(minted(prefix, call.call_id, n), "exec", text, "custom", "functions")
            if custom
            else ToolCall(minted(prefix, call.call_id, n), "bash", text)
            for n, text in enumerate(tools)
        ]
        content = [TextPart(said)] if said else []
        call.answer = Message("assistant", content, reasoning or None, calls)
        call.completion_token_ids = [1]
        call.parent_call_id = parent_id
        lineage.add(call, request)
        reply = dialect.encode(request, Completion(call.answer, finish_reason="stop"), call.call_id, 0.0)
        history += anthropic_echo(reply.body) if dialect is ANTHROPIC else responses_echo(reply.body)
        parent_id = call.call_id


def test_an_answer_that_flips_between_string_and_blocks_and_moves_its_cache_marker() -> None:
    lineage = Lineage()
    asked = [
        {"role": "user", "content": [{"type": "text", "text": "Hi.", "cache_control": {"type": "ephemeral"}}]}
    ]
    call = ModelCall(
        new_id(), "r1", 0, "anthropic", "", "ok", answer=Message("assistant", [TextPart("Yes.")])
    )
    call.completion_token_ids = [1]
    lineage.add(call, decode(ANTHROPIC, anthropic(asked)))
    for content in ("Yes.", [{"type": "text", "text": "Yes.", "cache_control": {"type": "ephemeral"}}]):
        history = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": content}]
        found = lineage.find(decode(ANTHROPIC, anthropic([*history, {"role": "user", "content": "Go on."}])))
        assert found.parent is not None
        assert found.edits == []


CALL = "01JD0Z6Q3W0000000000000007"
SEAL = seal(CALL, "Hm.")


@pytest.mark.parametrize(
    "block",
    [
        {"type": "tool_use", "id": f"toolu_{CALL}_0", "name": "bash", "input": {}},
        {"type": "thinking", "thinking": "", "signature": SEAL},
        {"type": "redacted_thinking", "data": SEAL},
    ],
    ids=lambda block: block["type"],
)
def test_each_id_of_ours_in_a_messages_history_names_the_call(block: dict[str, Any]) -> None:
    history = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": [block]}]
    assert Lineage().find(decode(ANTHROPIC, anthropic(history))).named == CALL


@pytest.mark.parametrize(
    "item",
    [
        {"type": "message", "role": "assistant", "id": f"msg_{CALL}_0", "content": "Yes."},
        {"type": "reasoning", "id": f"rs_{CALL}_0", "summary": []},
        {"type": "reasoning", "summary": [], "encrypted_content": SEAL},
        {"type": "function_call", "id": f"fc_{CALL}_0", "call_id": "x", "name": "bash", "arguments": "{}"},
        {"type": "function_call", "call_id": f"call_{CALL}_0", "name": "bash", "arguments": "{}"},
        {"type": "custom_tool_call", "id": f"ctc_{CALL}_0", "call_id": "x", "name": "exec", "input": "ls"},
        {"type": "custom_tool_call", "call_id": f"call_{CALL}_0", "name": "exec", "input": "ls"},
    ],
    ids=lambda item: "-".join([item["type"], *(key for key in item if "id" in key or key.startswith("enc"))]),
)
def test_each_id_of_ours_in_a_responses_history_names_the_call(item: dict[str, Any]) -> None:
    assert (
        Lineage().find(decode(RESPONSES, responses([{"role": "user", "content": "Hi."}, item]))).named == CALL
    )


def test_a_compaction_of_ours_is_known_as_one() -> None:
    item = {"type": "compaction", "encrypted_content": SEAL}
    found = Lineage().find(decode(RESPONSES, responses([{"role": "user", "content": "Hi."}, item])))
    assert found.fallback == "compacted"
