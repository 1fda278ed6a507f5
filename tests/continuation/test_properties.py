"""Conversations at random, with every template: an exact prompt reads as the rendering does, or is none."""

from __future__ import annotations

import json
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.continuation.models import ALL, SPECIAL, Model, Said, decode
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
    return Said(text, draw(texts) if model.thinks and draw(st.booleans()) else "", calls)


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


def reads(ids: list[int]) -> str:
    """The text without what notation and declared edits change."""
    text = squashed(ids, *THOUGHTS).replace("\ufffd", "")
    # Escapes of JSON, as `ensure_ascii` makes them, against the letters themselves.
    for letter, escape in (("é", "\\u00e9"), ("🙂", "\\ud83d\\ude42")):
        text = text.replace(escape, letter)
    return text
