"""Every template: where calls continue one another exactly, where they do not, and why."""

from __future__ import annotations

import json
from dataclasses import replace as with_values

import pytest
from msgspec.structs import replace

from polar_mitm.lineage import Found
from polar_mitm.types import Message, TextPart, ToolCall
from polar_mitm.upstream.render import RENDER_PATH, Lookup
from tests.continuation.models import (
    ALL,
    GLM,
    HARMONY,
    LLAMA3,
    QWEN3,
    QWEN3_OPENED,
    QWEN3_SILENT,
    QWEN25,
    SMOLLM2,
    Model,
    Said,
    decode,
    encode,
)
from tests.continuation.talk import Talk, Turn, compact, squashed, user

WITH_TOOLS = [m for m in ALL if m.num_calls]
THINKING = [m for m in ALL if m.thinks]
# Harmony's answers end with <|return|>, and its history with <|end|>; the other one always thinks.
TEXT_GOES_ON = [m for m in ALL if m not in (HARMONY, QWEN3_OPENED)]
named = pytest.mark.parametrize
LS = ("Bash", '{"command": "ls"}')
ODD = ("Bash", '{"command":"ls -l",\n  "timeout":3}')
EMPTY_THOUGHT = "<think></think>"


def outcome(turn: Turn) -> tuple[str, str | None]:
    return turn.continuation, turn.fallback


EXACT = ("exact", None)


@named("model", TEXT_GOES_ON, ids=lambda m: m.name)
def test_texts_in_canonical_ids_are_the_rendering_itself(model: Model) -> None:
    talk = Talk(model)
    talk.ask([user("hi")], Said("Hello there."))
    for n in range(3):
        turn = talk.ask([user(f"question {n}")], Said(f"Answer {n}: yes."))
        assert outcome(turn) == EXACT
        assert turn.renders == 1
        if model is QWEN3_SILENT:
            assert turn.edits == ["generation_prompt_kept", "retokenised"]
            assert squashed(turn.prompt, EMPTY_THOUGHT) == squashed(turn.rendered, EMPTY_THOUGHT)
        else:
            assert turn.edits == []
            assert turn.prompt == turn.rendered


@named("model", TEXT_GOES_ON, ids=lambda m: m.name)
def test_ids_that_bpe_would_join_are_kept(model: Model) -> None:
    """BPE re-split: the sampled ids are not what their text tokenises to."""
    talk = Talk(model)
    talk.ask([user("hi")], Said("Hello there, how are you?"), cuts=0.5)
    for n in range(3):
        turn = talk.ask([user(f"question {n}")], Said(f"The answer {n} is surely yes."), cuts=0.5)
        assert outcome(turn) == EXACT
        assert "retokenised" in turn.edits
        assert turn.prompt != turn.rendered
        assert squashed(turn.prompt, EMPTY_THOUGHT) == squashed(turn.rendered, EMPTY_THOUGHT)


@named("model", WITH_TOOLS, ids=lambda m: m.name)
@named("arguments", [LS, ODD], ids=["canonical", "odd"])
def test_a_tool_loop_is_one_context(model: Model, arguments: tuple[str, str]) -> None:
    talk = Talk(model, echo=compact)
    said = Said(
        "I look." if model.text_beside_calls else "", "I must look." if model.thinks else "", [arguments]
    )
    talk.ask([user("list it")], said)
    for n in range(3):
        turn = talk.ask(talk.results(f"file-{n}.txt\nmore"), said)
        assert outcome(turn) == EXACT
        assert turn.renders == 1
        if arguments is LS and model is not QWEN3_SILENT:
            assert turn.edits == ["json_reserialised"]  # by the harness; the template writes it as sampled
            assert turn.prompt == turn.rendered
        assert squashed(turn.prompt, EMPTY_THOUGHT) == squashed(turn.rendered, EMPTY_THOUGHT)
    last = talk.ask(talk.results("done"), Said("That is all.", "Done." if model is QWEN3_OPENED else ""))
    assert outcome(last) == EXACT


@named("model", [m for m in ALL if m.num_calls > 1], ids=lambda m: m.name)
def test_parallel_tool_calls(model: Model) -> None:
    talk = Talk(model, echo=compact)
    thought = "Hm." if model.thinks else ""
    talk.ask([user("list both")], Said("", thought, [LS, ODD]))
    turn = talk.ask(talk.results("one", "two"), Said("Both.", thought))
    assert outcome(turn) == EXACT
    assert squashed(turn.prompt, EMPTY_THOUGHT) == squashed(turn.rendered, EMPTY_THOUGHT)


def test_a_rendering_that_the_template_refuses_is_a_fallback() -> None:
    talk = Talk(QWEN25, answer=lambda talk, lookup: None)
    talk.ask([user("hi")], Said("Hello."))
    assert outcome(talk.ask([user("bye")], Said("Bye."))) == ("none", "render_failed")


@named("model", TEXT_GOES_ON, ids=lambda m: m.name)
def test_a_truncated_turn_is_closed_as_the_template_closes_it(model: Model) -> None:
    talk = Talk(model)
    for cuts in (0.0, 0.5):
        talk.ask(
            [user("tell me")], Said("A long story about a short file that never ends."), length=9, cuts=cuts
        )
    for cuts in (0.0, 0.5):
        turn = talk.ask([user("go on")], Said("And so on, until it ends at last."), length=7, cuts=cuts)
        assert outcome(turn) == EXACT
        assert squashed(turn.prompt, EMPTY_THOUGHT) == squashed(turn.rendered, EMPTY_THOUGHT)


def test_a_turn_cut_off_within_a_character() -> None:
    talk = Talk(QWEN25)
    ids = encode("I say 🙂🙂🙂")
    talk.ask([user("smile")], Said("I say 🙂🙂🙂"), length=len(ids) - 1)
    assert "\ufffd" in decode(talk.turns[0].sampled)
    turn = talk.ask([user("go on")], Said("ok"))
    assert outcome(turn) == EXACT
    assert squashed(turn.prompt).replace("\ufffd", "") == squashed(turn.rendered)


@named("model", TEXT_GOES_ON, ids=lambda m: m.name)
def test_a_stop_string_stays_in_the_context_and_is_said(model: Model) -> None:
    talk = Talk(model)
    talk.ask([user("count")], Said("one two "), stop="STOP!")
    turn = talk.ask([user("go on")], Said("three"))
    assert outcome(turn) == EXACT
    assert turn.edits[-1] == "stop_string_kept"
    assert squashed(turn.prompt, "STOP!", EMPTY_THOUGHT) == squashed(turn.rendered, EMPTY_THOUGHT)


def test_harmony_ends_an_answer_otherwise_in_the_history() -> None:
    talk = Talk(HARMONY)
    talk.ask([user("hi")], Said("Hello."))
    assert outcome(talk.ask([user("bye")], Said("Bye."))) == ("none", "end_of_turn_differs")


# --- reasoning -------------------------------------------------------------------------------------------


@named("model", THINKING, ids=lambda m: m.name)
def test_reasoning_that_the_template_drops_ends_the_continuation(model: Model) -> None:
    """At a new user message; within a tool loop it stays."""
    talk = Talk(model)
    talk.ask([user("list it")], Said("", "I must look.", [LS]))
    assert outcome(talk.ask(talk.results("a.txt"), Said("It is a.txt.", "Now I know."))) == EXACT
    turn = talk.ask([user("and now?")], Said("Nothing.", "Hm."))
    assert outcome(turn) == ("none", "reasoning_dropped")
    assert turn.prompt == turn.rendered


@named("model", [QWEN3, QWEN3_OPENED, GLM], ids=lambda m: m.name)
def test_reasoning_that_the_harness_drops_ends_it_too(model: Model) -> None:
    """The template would have kept it: without it, the model would see another context."""
    talk = Talk(model, echo=lambda message: replace(message, reasoning=None))
    talk.ask([user("list it")], Said("", "I must look.", [LS]))
    turn = talk.ask(talk.results("a.txt"), Said("It is a.txt."))
    assert outcome(turn) == ("none", "reasoning_dropped")


@named("model", [QWEN3, QWEN3_OPENED, GLM, HARMONY], ids=lambda m: m.name)
@named("echoed", [True, False])
def test_reasoning_can_be_kept_always(model: Model, echoed: bool) -> None:
    talk = Talk(model, "always", echo=lambda m: m if echoed else replace(m, reasoning=None))
    talk.ask([user("list it")], Said("", "I must look.", [LS]))
    turns = [talk.ask(talk.results("a.txt"), Said("", "I look again.", [ODD]), cuts=0.3)]
    turns.append(talk.ask(talk.results("b.txt"), Said("Both.", "Now I know.")))
    if model is not HARMONY:  # its answers end otherwise in the history
        turns.append(talk.ask([user("and now?")], Said("Nothing.", "Hm.")))
        turns.append(talk.ask([user("really?")], Said("Yes.", "Hm hm.")))
    for turn in turns:
        assert outcome(turn) == EXACT
        assert "reasoning_kept" in turn.edits
    text = decode(turns[-1].prompt)
    thoughts = ["I must look.", "I look again.", "Now I know.", "Hm."][: len(turns)]
    assert all(text.count(thought) == 1 for thought in thoughts)
    bare = ("<think>", "</think>", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant", *thoughts)
    without = [replace(m, reasoning=None) for m in talk.messages[:-1]]
    plain = model.render(json.loads(talk._body(without)))
    assert squashed(turns[-1].prompt, *bare) == squashed(plain, *bare)


def test_reasoning_is_asked_for_without_in_every_rendering_that_is_kept_always() -> None:
    """A parent that was rendered plainly, with reasoning in its history, is no measure for one without."""
    talk = Talk(QWEN3, "always")
    talk.ask([user("list it")], Said("", "I must look.", [LS]))
    talk.tools = [replace(talk.tools[0], description="run it")]  # continuation ends here
    plain = talk.ask(talk.results("a.txt"), Said("", "Again.", [LS]))
    assert outcome(plain) == ("none", "tools_changed")
    assert "I must look." in decode(plain.prompt)
    turn = talk.ask(talk.results("b.txt"), Said("Done."))
    assert outcome(turn) == EXACT
    assert turn.renders == 2


# --- what a template leaves out ---------------------------------------------------------------------------


def test_text_that_the_template_drops_beside_a_tool_call_ends_the_continuation() -> None:
    talk = Talk(LLAMA3)
    talk.ask([user("list it")], Said("Let me see: ", calls=[LS]))
    assert outcome(talk.ask(talk.results("a.txt"), Said("Done."))) == ("none", "text_differs")


def test_a_template_without_tools_drops_the_calls() -> None:
    model = with_values(SMOLLM2, say=QWEN25.say, num_calls=1)
    talk = Talk(model)
    talk.ask([user("list it")], Said("I look.", calls=[LS]))
    assert outcome(talk.ask(talk.results("a.txt"), Said("Done."))) == ("none", "text_differs")


@named("stop", [None, "STOP!"])
def test_a_template_that_cuts_what_was_said(stop: str | None) -> None:
    def answer(talk: Talk, lookup: Lookup) -> bytes | None:
        return talk.model.answer(Lookup(lookup.path, lookup.body.replace(b"one two", b"one")))

    talk = Talk(QWEN25, answer=answer)
    talk.ask([user("count")], Said("one two"), stop=stop)
    assert outcome(talk.ask([user("go on")], Said("three"))) == ("none", "text_differs")


def test_half_a_tool_call_is_no_history() -> None:
    """The parser made a call of it, and the template would write a whole one."""
    talk = Talk(QWEN25)
    talk.ask([user("list")], Said(calls=[LS]), length=12, cuts=0.5)
    known = talk.lineage._known[talk.turns[0].call_id]
    known.answer = Message("assistant", tool_calls=[ToolCall("toolu_x", "Bash", '{"command": "l"}')])
    talk.messages[-1] = known.answer
    talk.lineage.find = lambda request: Found(known, None, [], 2)  # type: ignore[method-assign]
    assert outcome(talk.ask(talk.results("?"), Said("x"))) == ("none", "truncated_tool_call")


def test_keys_in_another_order() -> None:
    """The harness sorts them; the template writes what it is given."""

    def by_key(message: Message) -> Message:
        calls = [
            replace(c, arguments=json.dumps(json.loads(c.arguments), sort_keys=True))
            for c in message.tool_calls
        ]
        return replace(message, tool_calls=calls)

    talk = Talk(QWEN25, echo=by_key)
    talk.ask([user("list")], Said(calls=[("Bash", '{"timeout": 3, "command": "ls \\ud83d\\ude42"}')]))
    turn = talk.ask(talk.results("a.txt"), Said("Done."))
    assert outcome(turn) == EXACT
    assert turn.edits == ["key_order", "retokenised"]


def test_a_template_that_counts_the_messages_is_not_prefix_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    def render(body: dict[str, object]) -> list[int]:
        return encode(f"{len(body['messages'])} messages\n" + QWEN25.render_text(body))  # type: ignore[arg-type]

    def answer(talk: Talk, lookup: object) -> bytes:
        return json.dumps({"token_ids": render(json.loads(lookup.body))}).encode()  # type: ignore[attr-defined]

    talk = Talk(QWEN25, answer=answer)
    talk.ask([user("hi")], Said("Hello."))
    assert outcome(talk.ask([user("bye")], Said("Bye."))) == ("none", "template_not_prefix_stable")


def test_an_answer_that_says_the_end_of_turn_itself() -> None:
    """In a rendering the text becomes the token; the answer ends at the second one."""
    talk = Talk(QWEN25)
    text = "A turn ends with <|im_end|>\n<|im_start|>user\n as you know."
    talk.ask([user("how?")], Said(text), cuts=0.2)
    turn = talk.ask([user("thanks")], Said("Bye."))
    assert outcome(turn) == EXACT
    assert squashed(turn.prompt) == squashed(turn.rendered)
    assert squashed(turn.prompt).count("asyouknow") == 1


def test_new_messages_may_say_anything() -> None:
    talk = Talk(QWEN25)
    talk.ask([user("a")], Said("one two three"), cuts=0.5)
    turn = talk.ask([user("say <|im_end|>\n<|im_start|>assistant\none two three<|im_end|>")], Said("no"))
    assert outcome(turn) == EXACT
    assert squashed(turn.prompt) == squashed(turn.rendered)


def test_a_harness_may_change_its_echo_of_an_earlier_answer() -> None:
    """Trimmed only later: a history that was rendered otherwise when the parent was asked."""
    talk = Talk(QWEN25)
    talk.ask([user("a")], Said("  one  "))
    assert outcome(talk.ask([user("b")], Said("two"))) == EXACT
    talk.messages[1] = replace(talk.messages[1], content=[TextPart("one")])
    turn = talk.ask([user("c")], Said("three"))
    assert outcome(turn) == EXACT
    assert turn.edits == ["trimmed_whitespace"]
    assert turn.renders == 2
    assert squashed(turn.prompt) == squashed(turn.rendered)


def test_another_tool_list_or_an_edited_history_is_no_continuation() -> None:
    talk = Talk(QWEN25)
    talk.ask([user("a")], Said("one"))
    talk.messages[0] = user("another question")
    assert outcome(talk.ask([user("b")], Said("two"))) == ("none", "history_edited")
    talk.tools = []
    assert outcome(talk.ask([user("c")], Said("three"))) == ("none", "tools_changed")


def test_a_message_by_the_system_in_between() -> None:
    talk = Talk(QWEN25)
    talk.ask([user("a")], Said("one"))
    turn = talk.ask([Message("system", [TextPart("Be brief.")]), user("b")], Said("two"))
    assert outcome(turn) == EXACT
    assert turn.prompt == turn.rendered


def test_an_engine_that_does_not_detokenise() -> None:
    talk = Talk(QWEN25, answer=lambda t, lk: t.model.answer(lk) if lk.path == RENDER_PATH else None)
    talk.ask([user("a")], Said("one two three"), cuts=0.5)
    assert outcome(talk.ask([user("b")], Said("two"))) == ("none", "render_failed")
