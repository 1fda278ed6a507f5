"""What the contents of Gemini requests come to, and what Gemini CLI sends back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.ids import call_id_of
from polar_mitm.lineage import Lineage
from polar_mitm.types import (
    ImagePart,
    Message,
    ModelCall,
    TextPart,
    ToolCall,
)
from tests.dialects.gemini_requests import (
    CALL,
    OTHER,
    PATH,
    called,
    contents,
    decode,
    dialect,
    fixture,
    refused,
    responded,
    signature,
)

# --- contents -------------------------------------------------------------------------------------------


def test_system_parts_become_one_leading_message() -> None:
    request = decode(systemInstruction={"parts": [{"text": "a"}, {"text": ""}, {"text": "b"}]})
    assert request.messages[0] == Message("system", [TextPart("a\n\nb")])


def test_an_unknown_role() -> None:
    assert "contents[0].role" in refused(contents=[{"role": "system", "parts": [{"text": "x"}]}])


@pytest.mark.parametrize("data", ["+/+/", "-_-_"])
def test_images_in_either_base64_alphabet(data: str) -> None:
    (message,) = contents(("user", [{"inlineData": {"mimeType": "image/jpeg", "data": data}}]))
    assert message.content == [ImagePart("data:image/jpeg;base64,+/+/")]


def test_what_a_local_model_cannot_read_is_named() -> None:
    parts: list[Any] = [
        {"inlineData": {"mimeType": "application/pdf", "data": "aGk="}},
        {"fileData": {"fileUri": "https://a/b.mp4"}},
        {"somethingNew": {}},
    ]
    request = decode(contents=[{"role": "user", "parts": parts}])
    assert request.messages[0].content == [
        TextPart("[inline_data of type application/pdf left out]"),
        TextPart("[file_data: https://a/b.mp4 left out]"),
        TextPart("[part left out]"),
    ]
    assert request.notes == ["placeholder:inline_data", "placeholder:file_data", "placeholder:part"]


def test_responses_of_functions_come_first_and_are_matched() -> None:
    messages = contents(
        ("user", [{"text": "hi"}]),
        ("model", [called("f", id="a"), called("g"), called("f")]),
        ("function", [responded("f", {"output": "one"}, id="a"), responded("g", {"error": "no"})]),
        ("user", [{"text": "and"}, responded("f", {"output": {"x": 1}})]),
    )
    assert [c.id for c in messages[1].tool_calls] == ["a", "call_1", "call_2"]
    assert [(m.role, m.text, m.tool_call_id) for m in messages[2:]] == [
        ("tool", "one", "a"),
        ("tool", "Error:no", "call_1"),
        ("tool", '{"x": 1}', "call_2"),
        ("user", "and", None),
    ]


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ({"output": "as it\nstands"}, "as it\nstands"),
        ({"result": "x"}, '{"result": "x"}'),
        ({"output": "x", "more": 1}, '{"output": "x", "more": 1}'),
        ({"output": [1, 2]}, "[1, 2]"),
        ({}, "{}"),
        (None, ""),
    ],
)
def test_what_a_function_gave_back(response: Any, text: str) -> None:
    (message,) = contents(("user", [responded("f", response)]))
    assert (message.role, message.text) == ("tool", text)


def test_a_function_may_give_an_image_back() -> None:
    image = {"inlineData": {"mimeType": "image/png", "data": "aGk="}}
    (message,) = contents(("user", [responded("f", {"output": "see"}, parts=[image])]))
    assert message.content == [TextPart("see"), ImagePart("data:image/png;base64,aGk=")]


# --- the model's turns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("urlsafe", [False, True])
def test_a_seal_gives_the_thoughts_back(urlsafe: bool) -> None:
    """SDKs write the bytes of a signature in their own alphabet of base64."""
    text = "thought?" * 20 + "ÿþ~~~"
    said = {"text": "so", "thoughtSignature": signature(text=text, urlsafe=urlsafe)}
    for shown in ([], [{"text": "shown otherwise", "thought": True}]):
        (message,) = contents(("model", [*shown, said]))
        assert (message.reasoning, message.text, message.minted_ids) == (text, "so", [f"rs_{CALL}"])


def test_thoughts_without_a_seal_are_what_is_shown() -> None:
    (message,) = contents(
        ("model", [{"text": "hm ", "thought": True}, {"text": "so", "thoughtSignature": "SFhU"}])
    )
    assert (message.reasoning, message.text, message.minted_ids) == ("hm ", "so", [])


@pytest.mark.parametrize("blob", ["skip_thought_signature_validator", "", "%%", "cG9sYXI=", "cG9sYXJ4eHh4"])
def test_a_signature_of_somebody_else(blob: str) -> None:
    (message,) = contents(("model", [{"text": "so", "thoughtSignature": blob}]))
    assert message == Message("assistant", [TextPart("so")])


def test_chunks_of_one_answer_are_one_message() -> None:
    messages = contents(
        ("model", [{"text": "hm", "thought": True}]),
        ("model", [{"text": "one ", "thoughtSignature": signature(text="hm")}]),
        ("model", [{"text": "two"}]),
        ("model", [{"text": ""}, {"thoughtSignature": signature()}]),
        ("model", [called("f"), called("g")]),
        ("user", [responded("g", {}), responded("f", {})]),
    )
    assert messages[0] == Message(
        "assistant",
        [TextPart("one two")],
        "hm",
        [ToolCall(f"call_{CALL}_0", "f", "{}"), ToolCall(f"call_{CALL}_1", "g", "{}")],
        minted_ids=[f"rs_{CALL}", f"call_{CALL}_0", f"call_{CALL}_1"],
    )
    assert [m.tool_call_id for m in messages[1:]] == [f"call_{CALL}_1", f"call_{CALL}_0"]


def test_answers_of_two_calls_are_two_messages() -> None:
    messages = contents(
        ("model", [{"text": "a", "thoughtSignature": signature(text="x")}]),
        ("model", [{"text": "b", "thoughtSignature": signature(OTHER)}]),
    )
    assert [(m.text, m.reasoning) for m in messages] == [("a", "x"), ("b", None)]


def test_gemini_cli_puts_the_name_before_an_id() -> None:
    messages = contents(
        ("model", [called("ls", id=f"ls__call_{CALL}_0"), called("ls", id="ls__foreign")]),
        ("user", [responded("ls", {"output": "x"}, id=f"ls__call_{CALL}_0")]),
    )
    assert [c.id for c in messages[0].tool_calls] == [f"call_{CALL}_0", "ls__foreign"]
    assert messages[1].tool_call_id == f"call_{CALL}_0"
    assert messages[1].minted_ids == [f"call_{CALL}_0"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_arguments_are_written_as_chat_templates_write_them(value: Any) -> None:
    args = {"a": value, "b": 1}
    compact = json.dumps(args, separators=(",", ":"), ensure_ascii=False)
    head = '{"contents":[{"role":"model","parts":[{"functionCall":{"name":"f","args":'
    body = head + compact + "}}]}]}"
    (call,) = dialect.decode(body.encode(), {}, PATH).messages[0].tool_calls
    assert call.arguments == json.dumps(args, ensure_ascii=False)


# --- what Gemini CLI sends ------------------------------------------------------------------------------


def test_gemini_cli_s_router() -> None:
    request = fixture("gemini_cli_router")
    assert [m.role for m in request.messages] == ["system", "user", "user"]
    assert request.response_schema is not None and request.response_schema["type"] == "object"
    properties = request.response_schema["properties"]
    assert [p["type"] for p in properties.values()] == ["string", "integer"]
    assert not request.tools and not request.stream and request.show_reasoning


def test_gemini_cli_s_turns_are_append_only() -> None:
    first, second = fixture("gemini_cli_turn1"), fixture("gemini_cli_turn2")
    assert second.messages[: len(first.messages)] == first.messages
    assert (first.tools, first.sampling, first.notes) == (second.tools, second.sampling, second.notes)
    answer, *results = second.messages[len(first.messages) :]
    assert (answer.text, answer.reasoning) == ("I will write it.", "The shell can do that.")
    assert [c.id for c in answer.tool_calls] == [r.tool_call_id for r in results]
    assert answer.tool_calls[0].arguments == json.dumps(
        {"command": "printf 'hé, %s:\\n' \"x\" > hello.txt"}, ensure_ascii=False
    )
    assert results[1].text == "Error:File not found: missing.txt"


@pytest.mark.parametrize(
    ("name", "edits"), [("gemini_cli_turn2", []), ("gemini_cli_resumed", ["reasoning_dropped"])]
)
def test_lineage_knows_what_gemini_cli_sends_back(name: str, edits: list[str]) -> None:
    request = fixture(name)
    said = fixture("gemini_cli_turn2").messages[2]
    call = ModelCall(CALL, "r", 0, "gemini", "POST x", "ok", answer=said, delivered=True)
    call.prompt_token_ids, call.completion_token_ids = [1, 2], [3]
    lineage = Lineage()
    lineage.add(call, fixture("gemini_cli_turn1"))
    request.messages = request.messages[:5]
    found = lineage.find(request)
    assert found.parent is not None and found.parent.call_id == CALL
    assert found.edits == edits


def test_a_resumed_session_keeps_the_ids() -> None:
    answer = fixture("gemini_cli_resumed").messages[2]
    assert [call_id_of(i) for i in answer.minted_ids] == [CALL, CALL]


def test_gemini_cli_s_web_search() -> None:
    request = fixture("gemini_cli_web_search")
    assert request.tools == [] and request.notes == ["withheld:google_search"]
