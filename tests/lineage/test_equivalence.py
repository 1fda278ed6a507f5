"""The declared list of harmless edits: what is on it, and what is not."""

from __future__ import annotations

import msgspec
import pytest

from polar_mitm.equivalence import EDITS_VERSION, HARMLESS, edits_between, same
from polar_mitm.types import ImagePart, Message, TextPart, ToolCall
from tests.lineage.world import answer, echo, text


def edits(said: Message, **changes: object) -> list[str] | None:
    return edits_between(said, echo(said, **changes))


def rewritten(before: str, after: str, kind: str = "function") -> list[str] | None:
    said = Message("assistant", tool_calls=[ToolCall("call_1", "bash", before, kind)])
    return edits_between(said, Message("assistant", tool_calls=[ToolCall("call_1", "bash", after, kind)]))


def test_a_change_of_the_list_is_a_change_of_its_version() -> None:
    assert (EDITS_VERSION, HARMLESS) == (
        1,
        ("trimmed_whitespace", "json_reserialised", "key_order", "empty_arguments", "reasoning_dropped"),
    )


@pytest.mark.parametrize(
    ("said", "echoed", "expected"),
    [
        ("Hi.", "Hi.", []),
        (" Hi.\n", "Hi.", ["trimmed_whitespace"]),
        (" Hi.\n", "Hi.\n", ["trimmed_whitespace"]),
        (" Hi.\n", " Hi.", ["trimmed_whitespace"]),
        ("\n\n", "", ["trimmed_whitespace"]),
        ("Hi.", " Hi.", None),
        ("Hi.", "Hi", None),
        ("Hi there.", "Hi  there.", None),
        ("Hi.", "", None),
        ("", "Hi.", None),
    ],
)
def test_text(said: str, echoed: str, expected: list[str] | None) -> None:
    assert edits(answer(said), content=text("assistant", echoed).content) == expected
    assert edits(answer("Yes.", reasoning=said or None), reasoning=echoed or None) == (
        ["reasoning_dropped"] if said == "Hi." and not echoed else expected
    )


def test_text_in_pieces_is_the_same_text() -> None:
    assert edits(answer("Hi there."), content=[TextPart("Hi "), TextPart("there.")]) == []


def test_an_image_is_no_text() -> None:
    assert edits(answer("Hi."), content=[TextPart("Hi."), ImagePart("data:,")]) is None


@pytest.mark.parametrize(
    ("said", "echoed", "expected"),
    [
        ('{"a": 1}', '{"a":1}', ["json_reserialised"]),
        ('{ "a" :1 }', '{"a": 1}', ["json_reserialised"]),
        ('{"a": "caf\\u00e9"}', '{"a": "café"}', ["json_reserialised"]),
        ('{"a": "\\/"}', '{"a": "/"}', ["json_reserialised"]),
        ('{"a": 1.50, "b": 2.0, "c": 1e3}', '{"a": 1.5, "b": 2, "c": 1000}', ["json_reserialised"]),
        ('{"a": 1.2345678901234568e20}', '{"a": 123456789012345680000}', ["json_reserialised"]),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', ["key_order"]),
        ('{"a": {"x": 1, "y": 2}}', '{"a":{"y":2,"x":1}}', ["key_order"]),
        ("", "{}", ["empty_arguments"]),
        (" \n", "{}", ["empty_arguments"]),
        ('{"a": 1}', '{"a": true}', None),
        ('{"a": 1}', '{"a": "1"}', None),
        ('{"a": 0}', '{"a": false}', None),
        ('{"a": null}', "{}", None),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', None),
        ('{"a": 12345678901234567890}', '{"a": 12345678901234567000}', None),
        ('{"a": "x "}', '{"a": "x"}', None),
        ('{"a": "x"', '{"a": "x"}', None),  # repaired: the tokens say something else
        ('{"a": "x"', '{"a":"x"', None),
        ("{}", "", None),
        ("[" * 100_000, "[" * 99_999, None),
        ('{"a": ' + "9" * 5000 + "}", '{"a": 9}', None),
    ],
)
def test_arguments(said: str, echoed: str, expected: list[str] | None) -> None:
    assert rewritten(said, echoed) == expected


def test_the_input_of_a_custom_tool_is_what_the_engine_wrapped() -> None:
    assert rewritten('{"input": "ls\\n"}', "ls\n", "custom") == []
    assert rewritten("ls", "ls", "custom") == []
    assert rewritten('{"input": "ls\\n"}', "ls", "custom") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "toolu_other"},
        {"name": "invalid"},
        {"kind": "custom"},
        {"namespace": "other"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_tool_call(changes: dict[str, str]) -> None:
    said = answer("Hi.", tools=['{"a": 1}'])
    assert edits(said, tool_calls=[msgspec.structs.replace(said.tool_calls[0], **changes)]) is None


def test_the_default_namespace_may_go_unsaid() -> None:
    said = answer("Hi.", tools=['{"a": 1}'])
    assert edits(said, tool_calls=[msgspec.structs.replace(said.tool_calls[0], namespace="functions")]) == []


def test_tool_calls_dropped_added_or_in_another_order() -> None:
    said = answer("Hi.", tools=['{"a": 1}', '{"a": 2}'])
    assert edits(said, tool_calls=said.tool_calls[:1]) is None
    assert edits(said, tool_calls=said.tool_calls[::-1]) is None
    assert edits(answer("Hi."), tool_calls=said.tool_calls) is None


def test_another_role() -> None:
    assert edits(answer("Hi."), role="user") is None


def test_reasoning_dropped_added_or_changed() -> None:
    said = answer("Hi.", reasoning="Hm.")
    assert edits(said, reasoning=None) == ["reasoning_dropped"]
    assert edits(said, reasoning="") == ["reasoning_dropped"]
    assert edits(said, reasoning="Ha.") is None
    assert edits(answer("Hi."), reasoning="Hm.") is None
    assert edits(answer("Hi.", reasoning="\n"), reasoning=None) == ["trimmed_whitespace"]


def test_messages_that_differ_in_minted_ids_only_are_the_same() -> None:
    before, now = text("user", "Hi."), text("user", "Hi.")
    now.minted_ids = ["msg_x"]
    assert same(before, now)
    assert not same(before, text("user", "Hi. "))
