"""Conversations at random, with every template: an exact prompt reads as the rendering does, or is none."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.continuation.models import ALL, HARMONY, QWEN3_OPENED, SPECIAL, Model, Said, decode
from tests.continuation.talk import Talk, compact, squashed, user

STOP = "#STOP#"
THOUGHTS = ("<think></think>", STOP)
# What the models' own mark-up may not be taken for; white space at the ends is trimmed by some templates.
words = st.text('ab {}"\\\n\té🙂<|', max_size=12).filter(lambda t: not any(s in t for s in SPECIAL))
texts = words.map(lambda t: f"x{t}x")
values = st.one_of(texts, st.integers(-5, 5), st.booleans(), st.lists(st.integers(0, 9), max_size=2))
arguments = st.dictionaries(st.sampled_from(["command", "a", "é"]), values, min_size=1, max_size=3)
notations = st.sampled_from([{}, {"separators": (",", ":")}, {"ensure_ascii": True}, {"indent": 2}])


@st.composite
def answers(draw: st.DrawFn, model: Model) -> Said:
    calls = []
    for _ in range(draw(st.integers(0, model.num_calls))):
        notation = {"ensure_ascii": False, **draw(notations)}
        calls.append(("Bash", json.dumps(draw(arguments), **notation)))
    text = draw(texts) if not calls or (model.text_beside_calls and draw(st.booleans())) else ""
    thinks = model.thinks and (model is QWEN3_OPENED or draw(st.booleans()))
    return Said(text, draw(texts) if thinks else "", calls)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_an_exact_prompt_reads_as_the_rendering_does(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(ALL), label="model")
    talk = Talk(
        model,
        echo=data.draw(st.sampled_from([compact, lambda message: message])),
        random=Random(data.draw(st.integers(0, 1000))),
    )
    new = [user(data.draw(texts))]
    for _ in range(data.draw(st.integers(2, 5))):
        said = data.draw(answers(model))
        plain = not said.calls and not said.reasoning
        turn = talk.ask(
            new,
            said,
            cuts=data.draw(st.sampled_from([0.0, 0.1, 0.5])),
            length=data.draw(st.integers(1, 6)) if plain and data.draw(st.booleans()) else None,
            stop=STOP if plain and data.draw(st.booleans()) else None,
        )
        new = [user(data.draw(texts))]
        if talk.messages[-1].tool_calls:
            new = talk.results(*[data.draw(texts) for _ in talk.messages[-1].tool_calls])
        if turn.continuation == "none":
            assert turn.fallback is not None
            assert turn.prompt == turn.rendered
            continue
        # `Talk` has checked that the prompt begins with the parent's own ids.
        before = talk.turns[-2]
        assert (
            turn.prompt[len(before.prompt) + len(before.sampled) :]
            == (
                turn.rendered[
                    len(turn.rendered) - len(turn.prompt) + len(before.prompt) + len(before.sampled) :
                ]
            )
        )
        assert reads(turn.prompt) == reads(turn.rendered)
        if all(not t.edits for t in talk.turns):
            assert decode(turn.prompt) == decode(turn.rendered)


THINKING = [model for model in ALL if model.thinks]
MARKUP = ("<think>", "</think>", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reasoning_kept_always_is_all_that_a_rendering_without_lacks(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(THINKING), label="model")
    talk = Talk(model, "always", random=Random(data.draw(st.integers(0, 1000))))
    thoughts, new = list[str](), [user("begin")]
    for n in range(data.draw(st.integers(2, 5))):
        said = data.draw(answers(model))
        if model is QWEN3_OPENED or said.reasoning:
            said = replace(said, reasoning=f"I think {n} times of it.")
        if data.draw(st.booleans()):  # the harness sends no reasoning back
            talk.echo = lambda message: structs.replace(message, reasoning=None)
        turn = talk.ask(new, said, cuts=data.draw(st.sampled_from([0.0, 0.1])))
        new = [user(data.draw(texts))]
        if said.calls:
            new = talk.results(*[data.draw(texts) for _ in said.calls])
        if n and turn.fallback != "end_of_turn_differs":  # Harmony's last words
            assert turn.fallback in (None, "text_differs")
            assert turn.continuation == "exact" or model is HARMONY
        if turn.continuation == "exact":
            bare = [structs.replace(m, reasoning=None) for m in talk.messages[:-1]]
            plain = model.render(json.loads(talk._body(bare)))
            leave_out = (*MARKUP, *thoughts)
            assert reads(turn.prompt, *leave_out) == reads(plain, *leave_out)
        thoughts.append(said.reasoning or "-")


def reads(ids: list[int], *leave_out: str) -> str:
    """The text without what notation and declared edits change."""
    text = squashed(ids, *THOUGHTS, *leave_out).replace("\ufffd", "")
    # Escapes of JSON, as `ensure_ascii` makes them, against the letters themselves.
    for letter, escape in (("é", "\\u00e9"), ("🙂", "\\ud83d\\ude42")):
        text = text.replace(escape, letter)
    return text
