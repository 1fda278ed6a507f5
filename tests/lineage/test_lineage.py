"""Which call a request continues, one test for each thing that harnesses do."""

from __future__ import annotations

import msgspec
import pytest

from polar_mitm.dialects.ids import minted, new_id
from polar_mitm.lineage import lineage_of
from polar_mitm.types import Message, Tool
from tests.lineage.world import (
    COMMAND,
    HEAD,
    TOOLS,
    World,
    ask,
    compact,
    copy,
    echo,
    parent,
    results,
    said,
    text,
)


def turn(call, **changes):
    """What a harness appends after a call's answer."""
    return [echo(said(call), **changes), *results(said(call))]


def test_the_first_call_continues_nothing() -> None:
    assert World().find(*HEAD).fallback == "first_call"


def test_a_tool_call_is_continued_by_its_id() -> None:
    world = World()
    call = world.call(ask(*HEAD), "I will.", tools=[COMMAND])
    found = world.find(*HEAD, *turn(call))
    assert (parent(found), found.fallback, found.edits) == (call.call_id, None, [])
    assert found.num_history == 3


def test_a_text_only_answer_is_found_by_what_was_asked_and_said() -> None:
    world = World()
    call = world.call(ask(*HEAD), "Done.\n")
    assert parent(world.find(*HEAD, *turn(call), text("user", "Go on."))) == call.call_id
    trimmed = world.find(*HEAD, text("assistant", "Done."), text("user", "Go on."))
    assert (parent(trimmed), trimmed.edits) == (call.call_id, ["trimmed_whitespace"])


def test_a_chain_names_its_last_call() -> None:
    world = World()
    first = world.call(ask(*HEAD), tools=[COMMAND])
    second = world.call(ask(*HEAD, *turn(first)), tools=[COMMAND, COMMAND])
    history = [*HEAD, *turn(first), *turn(second)]
    third = world.call(ask(*history), "All done.")
    assert third.parent_call_id == second.call_id
    found = world.find(*history, *turn(third), text("user", "Thanks."))
    assert (parent(found), found.num_history) == (third.call_id, len(history) + 1)


def test_each_use_of_a_harmless_edit_is_named_once_on_the_call_that_shows_it() -> None:
    world = World()
    first = world.call(ask(*HEAD), " Yes. ", reasoning="Hm.", tools=[COMMAND])
    (call,) = said(first).tool_calls
    changed = echo(
        said(first),
        content=text("assistant", "Yes.").content,
        reasoning=None,
        tool_calls=[msgspec.structs.replace(call, arguments=compact(COMMAND))],
    )
    history = [*HEAD, changed, *results(said(first))]
    second = world.call(ask(*history), tools=[COMMAND])
    assert second.edits == ["trimmed_whitespace", "json_reserialised", "reasoning_dropped"]
    found = world.find(*history, *turn(second))
    assert (parent(found), found.edits) == (second.call_id, [])


@pytest.mark.parametrize("ours", [True, False], ids=["with ids", "text only"])
def test_an_edited_answer_has_no_continuation(ours: bool) -> None:
    world = World()
    call = world.call(ask(*HEAD), "I will.", tools=[COMMAND] if ours else [])
    found = world.find(
        *HEAD, *turn(call, content=text("assistant", "I will not.").content), text("user", "Go on.")
    )
    assert (found.parent, found.fallback, found.named) == (None, "history_edited", call.call_id)


@pytest.mark.parametrize("ours", [True, False], ids=["with ids", "text only"])
def test_history_edited_before_the_answer_has_no_continuation(ours: bool) -> None:
    world = World()
    call = world.call(ask(*HEAD), "I will.", tools=[COMMAND] if ours else [])
    edited = [HEAD[0], text("user", "Do it!")]
    assert world.find(*edited, *turn(call), text("user", "Go on.")).fallback == "history_edited"
    longer = [*HEAD, text("user", "Please.")]
    assert world.find(*longer, *turn(call), text("user", "Go on.")).parent is None


def test_a_tool_list_that_changes() -> None:
    world = World()
    call = world.call(ask(*HEAD), tools=[COMMAND])
    more = [*TOOLS, Tool("read")]
    assert world.find(*HEAD, *turn(call), tools=more).fallback == "tools_changed"
    assert world.find(*HEAD, *turn(call), tools=[]).fallback == "tools_changed"


def test_a_system_prompt_that_changes() -> None:
    world = World()
    call = world.call(ask(*HEAD), tools=[COMMAND])
    assert world.find(text("system", "It is noon."), HEAD[1], *turn(call)).fallback == "system_changed"
    assert world.find(HEAD[1], *turn(call)).fallback == "system_changed"


def test_compaction_in_the_middle() -> None:
    world = World()
    first = world.call(ask(*HEAD), tools=[COMMAND])
    history = [*HEAD, *turn(first)]
    summary = world.call(ask(*history, text("user", "Summarise.")), "A summary.", role="compaction")
    assert summary.parent_call_id == first.call_id
    plain = [*HEAD, text("user", "A summary.")]
    assert world.find(*plain).fallback == "first_call"
    sealed = text("user", "Summary: A summary.")
    sealed.minted_ids = [minted("msg", summary.call_id)]
    after = world.call(ask(*HEAD, sealed), tools=[COMMAND])
    assert after.fallback == "compacted"
    assert parent(world.find(*HEAD, sealed, *turn(after))) == after.call_id


def test_two_subagents_with_equal_prefixes_interleaved() -> None:
    world = World()
    a1 = world.call(ask(*HEAD), "Looking.", tools=[COMMAND])
    b1 = world.call(ask(*HEAD), "Looking.", tools=[COMMAND])
    a2 = world.call(ask(*HEAD, *turn(a1)), "Found it.")
    b2 = world.call(ask(*HEAD, *turn(b1)), "Found it.")
    assert (a2.parent_call_id, b2.parent_call_id) == (a1.call_id, b1.call_id)
    go_on = text("user", "Go on.")
    assert parent(world.find(*HEAD, *turn(b1), *turn(b2), go_on)) == b2.call_id
    assert parent(world.find(*HEAD, *turn(a1), *turn(a2), go_on)) == a2.call_id


def test_text_only_twins_are_ambiguous_until_one_is_continued() -> None:
    world = World()
    a1 = world.call(ask(*HEAD), "Ready.")
    b1 = world.call(ask(*HEAD), "Ready.")
    history = [*HEAD, *turn(a1), text("user", "Go on.")]
    found = world.find(*history)
    assert (found.parent, found.fallback) == (None, "ambiguous")
    world.call(ask(*history), "Yes.", parent_call_id=a1.call_id)
    assert parent(world.find(*history)) == b1.call_id


def test_twins_with_equal_ids_are_no_ambiguity() -> None:
    world = World()
    ids = {"prompt_token_ids": [1, 2], "completion_token_ids": [3]}
    a1 = world.call(ask(*HEAD), "Ready.", **ids)
    b1 = world.call(ask(*HEAD), "Ready.", **ids)
    history = ask(*HEAD, *turn(a1), text("user", "Go on."))
    assert [world.call(history).parent_call_id for _ in range(2)] == [a1.call_id, b1.call_id]


def test_threads_with_equal_ids_go_on_side_by_side() -> None:
    """Each asks before any other was answered, and each continues a call of its own."""
    world, history = World(), [*HEAD]
    parents: set[str | None] = {None}
    for step in range(3):
        request = ask(*history)
        found = [world.lineage.find(request) for _ in range(4)]
        assert {parent(f) for f in found} == parents, step
        ids = {"prompt_token_ids": [1, 2, step], "completion_token_ids": [3]}
        calls = [world.call(request, "Ready.", parent_call_id=parent(f), **ids) for f in found]
        parents = {call.call_id for call in calls}
        history += [*turn(calls[0]), text("user", "Go on.")]


def test_a_retry_whose_first_answer_was_delivered_and_whose_second_was_not() -> None:
    world = World()
    first = world.call(ask(*HEAD), "Ready.")
    world.call(ask(*HEAD), "Ready.", delivered=False)
    assert parent(world.find(*HEAD, *turn(first), text("user", "Go on."))) == first.call_id


def test_the_closer_of_two_echoes_wins() -> None:
    world = World()
    world.call(ask(*HEAD), "Ready.\n")
    exact = world.call(ask(*HEAD), "Ready.")
    assert parent(world.find(*HEAD, text("assistant", "Ready."), text("user", "Go on."))) == exact.call_id


def test_a_fork_continues_the_same_call_twice() -> None:
    world = World()
    call = world.call(ask(*HEAD), "Which?")
    left = world.call(ask(*HEAD, *turn(call), text("user", "Left.")))
    right = world.call(ask(*HEAD, *turn(call), text("user", "Right.")))
    assert left.parent_call_id == right.parent_call_id == call.call_id


def test_a_rewound_conversation_continues_the_earlier_call() -> None:
    world = World()
    first = world.call(ask(*HEAD), tools=[COMMAND])
    world.call(ask(*HEAD, *turn(first)), "Done.")
    assert parent(world.find(*HEAD, *turn(first), text("user", "Differently."))) == first.call_id


def test_an_answer_that_is_not_ours_is_part_of_what_was_asked() -> None:
    world = World()
    first = world.call(ask(*HEAD), tools=[COMMAND])
    history = [*HEAD, *turn(first), text("assistant", "(interrupted)"), text("user", "Go on.")]
    second = world.call(ask(*history), tools=[COMMAND])
    assert second.parent_call_id == first.call_id
    assert parent(world.find(*history, *turn(second))) == second.call_id
    assert World().find(*history).fallback == "no_parent"


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "cancelled", "finish_reason": None},
        {"status": "failed"},
        {"completion_token_ids": []},
        {"answer": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_call_without_an_end_or_ids_is_no_parent(fields) -> None:
    world = World()
    call = world.call(ask(*HEAD), "I w", tools=[COMMAND])
    whole = said(call)
    world = World()
    broken = world.call(ask(*HEAD), "I w", **{"answer": whole, "call_id": call.call_id, **fields})
    found = world.find(*HEAD, echo(whole), *results(whole))
    assert (found.parent, found.fallback, found.named) == (None, "parent_not_usable", broken.call_id)


def test_a_truncated_answer_is_continued() -> None:
    world = World()
    call = world.call(ask(*HEAD), "I will wri", finish_reason="length")
    found = world.find(*HEAD, *turn(call), text("user", "Go on."))
    assert found.parent is not None
    assert found.parent.finish_reason == "length"


def test_ids_of_another_rollout_name_no_parent() -> None:
    other = World()
    call = other.call(ask(*HEAD), tools=[COMMAND])
    found = World().find(*HEAD, *turn(call))
    assert (found.fallback, found.named) == ("no_parent", call.call_id)


def test_answers_of_two_calls_in_one_message_are_an_edit() -> None:
    world = World()
    first = world.call(ask(*HEAD), tools=[COMMAND])
    second = world.call(ask(*HEAD, *turn(first)), tools=[COMMAND])
    merged = echo(said(first), tool_calls=[*said(first).tool_calls, *said(second).tool_calls])
    assert world.find(*HEAD, merged).fallback == "history_edited"


def test_a_replayed_answer_carries_the_ids_of_the_call_that_it_was_minted_for() -> None:
    recorded = World().call(ask(*HEAD), tools=[COMMAND])
    world = World()
    served = world.call(ask(*HEAD), answer=recorded.answer, replayed_from=recorded.call_id, call_id=new_id())
    assert parent(world.find(*HEAD, *turn(recorded))) == served.call_id


def test_a_resumed_session_and_a_restarted_interceptor_find_the_same() -> None:
    world = World()
    first = world.call(ask(*HEAD), tools=[COMMAND])
    second = world.call(ask(*HEAD, *turn(first)), "Done.")
    resumed = World()
    resumed.lineage.restore(((call, copy(asked)) for call, asked in world.calls), tokenizer="")
    request = [*HEAD, *turn(first), *turn(second), text("user", "And now?")]
    assert parent(world.find(*request)) == parent(resumed.find(*request)) == second.call_id


def test_a_call_that_is_added_again_replaces_itself() -> None:
    world = World()
    call = world.call(ask(*HEAD), "Ready.")
    world.lineage.add(*world.calls[0])
    assert parent(world.find(*HEAD, *turn(call), text("user", "Go on."))) == call.call_id


def test_the_longest_unused_is_forgotten_first() -> None:
    world = World(max_bytes=60_000)
    first = world.call(ask(*HEAD), tools=[COMMAND])
    second = world.call(ask(*HEAD), tools=[COMMAND], prompt_token_ids=[5] * 1000)
    assert parent(world.find(*HEAD, *turn(first))) == first.call_id
    world.call(ask(*HEAD), tools=[COMMAND], prompt_token_ids=[6] * 1000)
    found = world.find(*HEAD, *turn(second))
    assert (found.parent, found.fallback, found.named) == (None, "parent_evicted", second.call_id)
    assert parent(world.find(*HEAD, *turn(first))) == first.call_id


def test_the_last_call_of_a_waiting_thread_outlives_those_that_were_continued() -> None:
    world = World(max_bytes=150_000)
    waiting = world.call(ask(*HEAD), "Delegating.", tools=[COMMAND])
    history: list[Message] = [HEAD[0], text("user", "Search.")]
    for _ in range(10):
        call = world.call(ask(*history), tools=[COMMAND], prompt_token_ids=[5] * 1000)
        history += turn(call)
    assert parent(world.find(*HEAD, *turn(waiting))) == waiting.call_id
    assert parent(world.find(*history)) == call.call_id
    assert world.find(*history[:4]).fallback == "parent_evicted"


def test_500_calls_keep_each_message_once() -> None:
    world = World()
    history: list[Message] = list(HEAD)
    for number in range(500):
        call = world.call(ask(*history), f"Step {number}.", tools=[COMMAND])
        assert call.fallback == (None if number else "first_call")
        history += turn(call)
    kept = {id(m) for known in world.lineage._known.values() for m in known.messages}
    assert len(world.lineage._known) == 500
    assert len(kept) == len(history) - 2


def test_lineage_of_a_rollout_finds_what_was_found_live() -> None:
    world = World()
    a1 = world.call(ask(*HEAD), tools=[COMMAND])
    b1 = world.call(ask(*HEAD), tools=[COMMAND])
    world.call(ask(*HEAD, *turn(b1)), "Done.")
    world.call(ask(*HEAD, *turn(a1)), "Done.")
    found = dict((call.call_id, parent(f)) for call, f in lineage_of(reversed(world.calls)))
    assert found == {call.call_id: call.parent_call_id for call, _ in world.calls}


def test_a_call_is_no_parent_before_it_ends() -> None:
    world = World()
    slow = world.call(ask(*HEAD), "Ready.", ended_at=10.0)
    world.call(ask(*HEAD, *turn(slow), text("user", "Go on.")))
    assert [f.fallback for _, f in lineage_of(world.calls)] == ["first_call", "no_parent"]
