"""Random conversations: with harmless edits the parent is found and they are named; with any other, never."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_mitm.equivalence import HARMLESS
from polar_mitm.types import Message, TextPart, Tool
from tests.lineage.world import HEAD, TOOLS, World, answer, ask, echo, parent, results, said, text

words = st.text("ab é\n", max_size=6)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([1.5, 2.0])
    | st.text('aé"\\\n', max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.sampled_from(["command", "cwd", "n"]), values, max_size=3)
arguments = st.one_of(objects.map(json.dumps), st.sampled_from(["", '{"command": "oops', "ls -l"]))
answers = st.tuples(words, st.none() | words.filter(bool), st.lists(arguments, max_size=2))


def trimmed(before: str) -> tuple[str, set[str]]:
    return before.strip(), {"trimmed_whitespace"} if before != before.strip() else set()


def rewritten(before: str, how: str) -> tuple[str, set[str]]:
    """Arguments as a harness may send them back."""
    if not before:
        return "{}", {"empty_arguments"}
    try:
        value = json.loads(before)
    except ValueError:
        return before, set()
    if how == "key_order" and len(value) > 1:
        return json.dumps(dict(reversed(value.items()))), {"key_order"}
    after = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return after, {"json_reserialised"} if after != before else set()


@st.composite
def echoes(draw: Any, whole: Message) -> tuple[Message, set[str]]:
    """An answer after random harmless edits, and their names."""
    names: set[str] = set()
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        content, used = trimmed(whole.text)
        changes["content"] = [TextPart(content)] if content else []
        names |= used
    if whole.reasoning and draw(st.booleans()):
        drop = draw(st.booleans())
        kept, used = trimmed(whole.reasoning)
        changes["reasoning"] = None if drop else kept or None
        names |= {"reasoning_dropped"} if drop and kept else used
    calls = []
    for call in whole.tool_calls:
        how = draw(st.sampled_from(["verbatim", "compact", "key_order"]))
        if how != "verbatim":
            changed, used = rewritten(call.arguments, how)
            call = msgspec.structs.replace(call, arguments=changed)
            names |= used
        calls.append(call)
    return echo(whole, **changes, tool_calls=calls), names


@st.composite
def conversations(draw: Any) -> tuple[World, list[Message], set[str]]:
    """A world after some turns, the history that comes next, and the edits of its last answer."""
    world, history, names = World(), list(HEAD), set[str]()
    for number in range(draw(st.integers(1, 4))):
        content, reasoning, tools = draw(answers)
        call = world.call(ask(*history), content, reasoning=reasoning, tools=tools)
        assert call.parent_call_id == (world.calls[-2][0].call_id if number else None)
        assert call.edits == [edit for edit in HARMLESS if edit in names]
        back, names = draw(echoes(said(call)))
        history += [back, *results(said(call))]
        if not said(call).tool_calls or draw(st.booleans()):
            history.append(text("user", f"Go on, {number}."))
    return world, history, names


@settings(max_examples=60, deadline=None)
@given(conversations())
def test_harmless_edits_are_found_and_named(made: tuple[World, list[Message], set[str]]) -> None:
    world, history, names = made
    found = world.find(*history)
    assert parent(found) == world.calls[-1][0].call_id
    assert found.edits == [edit for edit in HARMLESS if edit in names]
    assert history[found.num_history - 1].role == "assistant"
    assert all(message.role != "assistant" for message in history[found.num_history :])


def longer(message: Message) -> None:
    message.content = [*message.content, TextPart("!")]


def other_tool(message: Message) -> None:
    message.tool_calls = [msgspec.structs.replace(call, name="invalid") for call in message.tool_calls]


def other_value(message: Message) -> None:
    message.tool_calls = [msgspec.structs.replace(call, arguments='{"z": 1}') for call in message.tool_calls]


def other_reasoning(message: Message) -> None:
    message.reasoning = (message.reasoning or "") + "!"


@settings(max_examples=100, deadline=None)
@given(conversations(), st.data())
def test_any_other_edit_is_never_joined(
    made: tuple[World, list[Message], set[str]], data: st.DataObject
) -> None:
    world, history, _ = made
    last = max(n for n, message in enumerate(history) if message.role == "assistant")
    history = [msgspec.json.decode(msgspec.json.encode(m), type=Message) for m in history]
    tools = TOOLS
    kind = data.draw(st.sampled_from(["message", "dropped", "inserted", "tools", "calls", "reasoning"]))
    at = data.draw(st.integers(0, last))
    if kind == "message":
        longer(history[at])
    elif kind == "dropped":
        del history[data.draw(st.integers(0, last - 1))]
    elif kind == "inserted":
        history.insert(at, text("user", "Wait."))
    elif kind == "tools":
        tools = [*TOOLS, Tool("more")]
    else:
        wanted = "tool_calls" if kind == "calls" else "reasoning"
        having = [m for m in history if getattr(m, wanted)]
        if not having:
            return
        edit = (
            other_reasoning if kind == "reasoning" else data.draw(st.sampled_from([other_tool, other_value]))
        )
        edit(data.draw(st.sampled_from(having)))
    found = world.find(*history, tools=tools)
    assert found.parent is None
    assert found.fallback in ("history_edited", "system_changed", "tools_changed")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_threads_with_equal_prefixes_never_meet(data: st.DataObject) -> None:
    """Sub-agents, asked and answering alike but for the ids of their tool calls, in any order of steps."""
    world = World()
    threads: list[tuple[list[Message], list[str]]] = [(list(HEAD), []) for _ in range(3)]
    for step in data.draw(st.lists(st.integers(0, 2), max_size=12)):
        history, ids = threads[step]
        call = world.call(ask(*history), "Looking.", tools=['{"command": "ls"}'])
        assert call.parent_call_id == (ids[-1] if ids else None)
        ids.append(call.call_id)
        history += [echo(said(call)), *results(said(call))]


@settings(max_examples=60, deadline=None)
@given(answers)
def test_an_answer_equals_itself(made: tuple[str, str | None, list[str]]) -> None:
    whole = answer(made[0], reasoning=made[1], tools=made[2])
    world = World()
    call = world.call(ask(*HEAD), made[0], reasoning=made[1], tools=made[2])
    assert parent(world.find(*HEAD, echo(said(call)), *results(whole), text("user", "x"))) == call.call_id
