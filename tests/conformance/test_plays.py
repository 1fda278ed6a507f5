"""A play leads any harness: by its history, whatever its tools are called."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from polar_mitm.conformance import plays
from polar_mitm.conformance.plays import LAST_WORDS, Compaction, Delegation, Play
from polar_mitm.conformance.scripts import Answer, fitting


def tool(name: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required or properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TEXT = {"type": "string"}
BASH = tool("Bash", command=TEXT)
EXEC = tool("exec_command", cmd=TEXT)


def asked(answers: int = 0, *tools: dict[str, Any], user: str = "go", last: str = "") -> dict[str, Any]:
    """A request whose history holds so many answers."""
    turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "told"}] * answers
    end = [{"role": "user", "content": last}] if last else []
    messages = [{"role": "system", "content": "You code."}, {"role": "user", "content": user}, *turns, *end]
    return {"messages": messages, "tools": list(tools or (BASH,))}


def command_of(answer: Answer) -> str:
    arguments = json.loads(answer.tool_calls[0][1])
    return str(arguments.get("command") or arguments["cmd"])


@pytest.mark.parametrize("shell", [BASH, EXEC])
def test_acts_follow_the_history_and_a_retry_gets_the_same_again(shell: dict[str, Any]) -> None:
    play = Play(plays.shell("one"), plays.shell("two"), plays.say())
    assert [command_of(play(asked(n, shell), 0)) for n in (0, 0, 1)] == ["one", "one", "two"]
    assert play(asked(2, shell), 0).text == play(asked(9, shell), 0).text == LAST_WORDS


def test_a_call_beside_the_play_gets_a_word_and_no_fault() -> None:
    play = Play(plays.shell("one"), plays.say(), faults=[plays.status(500)])
    title = {"messages": [{"role": "user", "content": "a title"}]}
    assert play(title, 0).status == 200 and not play(title, 0).tool_calls
    assert play(asked(), 0).status == 500
    assert play(asked(), 0).status == 200


def test_a_side_call_with_a_schema_gets_json_that_fits() -> None:
    schema = {
        "type": "object",
        "properties": {"score": {"type": "integer"}, "inner": {"type": "object", "properties": {"a": TEXT}}},
        "required": ["score", "inner"],
    }
    request = {
        "messages": [{"role": "user", "content": "?"}],
        "response_format": {"json_schema": {"schema": schema}},
    }
    assert json.loads(plays.beside(request).text) == {"score": 1, "inner": {}}
    assert fitting({"type": ["string", "null"]}) is None


def test_faults_keep_what_is_said() -> None:
    answer = Answer("words", tool_calls=(("Bash", "{}"),))
    assert plays.cut(answer).break_after_tokens and plays.cut(answer).tool_calls == answer.tool_calls
    assert plays.silent(150)(answer).silence_s == 150


def test_until_told_goes_by_what_tools_have_said() -> None:
    play = Play(plays.until_told(plays.shell("one"), plays.say()))
    begun = asked(0, BASH)
    begun["messages"].append({"role": "assistant", "content": "I will"})
    assert command_of(play(begun, 0)) == command_of(play(asked(0), 0)) == "one"
    assert play(asked(1), 0).text == LAST_WORDS


def test_broken_arguments_are_no_json() -> None:
    (call,) = plays.broken_arguments(asked(0, EXEC)).tool_calls
    with pytest.raises(json.JSONDecodeError):
        json.loads(call[1])


@pytest.mark.parametrize(
    ("reader", "path"),
    [
        (tool("Read", ("file_path",), file_path=TEXT, limit=TEXT), "file_path"),
        (tool("view_image", path=TEXT), "path"),
        (tool("read", filePath=TEXT), "filePath"),
    ],
)
def test_a_picture_is_read_with_whatever_reads_pictures(reader: dict[str, Any], path: str) -> None:
    (call,) = Play(plays.look_at("p.png"))(asked(0, BASH, reader), 0).tool_calls
    assert json.loads(call[1])[path] == "/workspace/p.png"


@pytest.mark.parametrize(
    "make", [lambda: Play(plays.look_at("p.png")), lambda: Delegation("go", "task", "command")]
)
def test_what_a_harness_lacks_is_noted(make: Callable[[], Play]) -> None:
    play = make()
    assert play.lacks is None and play(asked(), 0).text == LAST_WORDS
    assert play.lacks


def test_delegation_tells_the_agent_from_who_sent_it() -> None:
    agent = tool("task", description=TEXT, prompt=TEXT, subagent_type=TEXT)
    play = Delegation("Delegate.", "Do it.", "touch x")
    (call,) = play(asked(0, BASH, agent, user="Delegate."), 0).tool_calls
    assert json.loads(call[1])["prompt"] == "Do it."
    assert command_of(play(asked(0, BASH, user="Do it."), 0)) == "touch x"
    assert play(asked(1, BASH, agent, user="Delegate."), 0).text == LAST_WORDS


def test_delegation_waits_where_the_harness_does_not() -> None:
    spawn, wait = (
        tool("multi_agent_v1__spawn_agent", message=TEXT),
        tool("multi_agent_v1__wait_agent", targets=TEXT),
    )
    play = Delegation("Delegate.", "Do it.", "touch x")
    request = asked(1, EXEC, spawn, wait, user="Delegate.")
    request["messages"][-1]["content"] = '{"agent_id":"a-1","nickname":"n"}'
    assert play(request, 0).tool_calls == [("multi_agent_v1__wait_agent", '{"targets": ["a-1"]}')]


def test_compaction_goes_on_until_it_was_asked_for_a_summary() -> None:
    play = Compaction("touch x", num_tokens=99, prompts=("go", "again"))
    assert [play(asked(n), 0).num_prompt_tokens for n in range(4)] == [None, None, 99, None]
    assert play(asked(3), 0).text == LAST_WORDS
    assert command_of(play(asked(3, last="again"), 0)) == "touch x"
    sizes = [len(play(asked(n), 0).text) for n in range(3)]
    assert max(sizes) < 32_000 and sum(sizes) > 80_000
    summary = play(asked(2, BASH, last="Write a detailed summary of the conversation."), 0)
    assert summary.text.startswith("<summary>") and summary.num_prompt_tokens == 99
    assert play.num_summaries == 1 and play(asked(0), 0).text == LAST_WORDS


def test_a_title_is_no_summary_but_a_conversation_as_text_is() -> None:
    head = {"role": "system", "content": "You are a context summarization assistant."}
    for length, wanted in ((10, False), (9000, True)):
        request = {"messages": [head, {"role": "user", "content": "x" * length}]}
        assert plays.asks_for_summary(request) is wanted
