"""Numbers in tool arguments: models, templates and harnesses each write the same value in their own way."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from polar_mitm.continuation import _plain
from polar_mitm.types import Message
from tests.continuation.models import ALL, QWEN25, Said
from tests.continuation.talk import Talk, compact, user

MODELS = [model for model in ALL if model.num_calls]
digits = st.text("0123456789", min_size=1, max_size=25)
whole = st.from_regex(r"-?(0|[1-9][0-9]{0,25})", fullmatch=True)
fraction = st.one_of(st.just(""), digits.map(lambda d: f".{d}"), st.sampled_from([".0", ".50", ".000"]))
exponent = st.one_of(
    st.just(""),
    st.from_regex(r"[eE][+-]?[0-9]{1,2}", fullmatch=True),
    st.sampled_from(["e999999999", "E-400"]),
)
numbers = st.tuples(whole, fraction, exponent).map("".join)
floats = st.tuples(whole, fraction, st.from_regex(r"[eE][+-]?[0-9]{1,2}", fullmatch=True)).map("".join)


def in_python(value: Any) -> str:
    return json.dumps(value)


def in_javascript(value: Any) -> str:
    """As ECMAScript's Number::toString has it: plain digits below 1e21, `1e+21` and `1e-7` beyond."""
    if value == 0:
        return "0"
    sign, shortest, _ = Decimal(repr(value)).normalize().as_tuple()
    mantissa, point = "".join(map(str, shortest)), Decimal(repr(value)).adjusted() + 1
    if -6 < point <= 21:
        if point <= 0:
            text = f"0.{'0' * -point}{mantissa}"
        elif point >= len(mantissa):
            text = mantissa + "0" * (point - len(mantissa))
        else:
            text = f"{mantissa[:point]}.{mantissa[point:]}"
    else:
        text = mantissa[0] + (f".{mantissa[1:]}" if mantissa[1:] else "") + f"e{point - 1:+d}"
    return "-" * sign + text


def echoing(write: Any) -> Any:
    """A harness that parses arguments `{"n": number}`, and writes them again."""

    def echo(message: Message) -> Message:
        calls = [
            replace(call, arguments=f'{{"n":{write(json.loads(call.arguments, parse_int=float)["n"])}}}')
            for call in message.tool_calls
        ]
        return replace(message, tool_calls=calls)

    return echo


def goes_on(talk: Talk, arguments: str) -> None:
    thought = "Hm." if talk.model.thinks else ""
    talk.ask([user("compute")], Said("", thought, [("Bash", arguments)]))
    turn = talk.ask(talk.results("done"), Said("ok", thought))
    assert (turn.continuation, turn.fallback) == ("exact", None)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("text", ["1.50", "1e2", "1.5e-7", "-0.0", "-0", "2.5E+3", "1e22", "0.1000"])
def test_a_number_in_another_notation_is_the_same_context(model: Any, text: str) -> None:
    arguments = f'{{"command": "sleep 1.50", "t": [{text}, 12345678901234567890]}}'
    for echo in (compact, lambda message: message):
        goes_on(Talk(model, echo=echo), arguments)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MODELS), floats, st.sampled_from([in_python, in_javascript]))
def test_any_float_goes_on_however_it_is_echoed(model: Any, text: str, write: Any) -> None:
    goes_on(Talk(model, echo=echoing(write)), f'{{"n": {text}}}')


@settings(max_examples=500, deadline=None)
@given(numbers, numbers, st.sampled_from([in_python, in_javascript, None]))
def test_only_equal_numbers_read_the_same(one: str, other: str, write: Any) -> None:
    if write and value(one) != one:
        other = write(float(one))
    assert (_plain(f'{{"n": {one}}}') == _plain(f'{{"n":{other}}}')) == (value(one) == value(other))


def value(text: str) -> Any:
    """The number; as text where no float holds it."""
    if set(text) <= set("-0123456789"):
        return int(text)
    held = Decimal(repr(float(text)))
    return held if held.is_finite() else text


def test_a_template_that_changes_a_number_ends_the_continuation() -> None:
    def changed(talk: Talk, lookup: Any) -> bytes | None:
        body = lookup.body.replace(b"1.25", b"1.75")
        return talk.model.answer(replace(lookup, body=body))

    talk = Talk(QWEN25, answer=changed)
    talk.ask([user("wait")], Said(calls=[("Bash", '{"t": 1.250}')]))
    turn = talk.ask(talk.results("done"), Said("ok"))
    assert (turn.continuation, turn.fallback) == ("none", "text_differs")


@pytest.mark.parametrize(
    "text", ["9" * 300_000, "1e" + "9" * 300_000, "1." + "0" * 300_000 + "1", "-0" * 150_000]
)
def test_very_long_numbers_take_no_long_time_and_no_room(text: str) -> None:
    assert len(_plain(text)) <= len(text)
