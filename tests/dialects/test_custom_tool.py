"""Unwrapping `{"input": "..."}` as it arrives."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.custom_tool import InputUnwrapper, unwrap

_ANY_TEXT = st.text(st.characters() | st.sampled_from('\\"{}:\n\t\ud83d\ude00\U0001f600é'), max_size=60)
_SPACE = st.text(" \t\n\r", max_size=2)


def _split(text: str, cuts: list[int]) -> list[str]:
    at = sorted({c % (len(text) + 1) for c in cuts})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


def _feed(fragments: list[str]) -> str:
    unwrapper = InputUnwrapper()
    return "".join([*map(unwrapper.feed, fragments), unwrapper.finish()])


def _readable(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


_cuts = st.lists(st.integers(0, 500), max_size=12)


@given(_ANY_TEXT, st.booleans(), _SPACE, _SPACE, _cuts)
def test_equals_json_for_any_split(text: str, ascii_only: bool, before: str, between: str, cuts: list[int]):
    # json.dumps leaves lone surrogates alone unless it escapes everything; escapes are what engines send.
    value = json.dumps(text if ascii_only else _readable(text), ensure_ascii=ascii_only)
    arguments = f'{before}{{{between}"input"{before}:{between}{value}{before}}}{between}'
    want = _readable(json.loads(arguments)["input"])
    assert _feed(_split(arguments, cuts)) == want
    assert unwrap(arguments) == want


@given(st.one_of(_ANY_TEXT, _ANY_TEXT.map(lambda t: '{"input": "' + t)), _cuts)
def test_any_text_gives_one_result_for_any_split(text: str, cuts: list[int]):
    assert _feed(_split(text, cuts)) == unwrap(text)


@given(st.text(st.characters(codec="utf-8")).filter(lambda t: not t.lstrip(" \t\n\r").startswith("{")), _cuts)
def test_plain_text_is_the_input_as_it_stands(text: str, cuts: list[int]):
    assert _feed(_split(text, cuts)) == text


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ('{"input": ""}', ""),
        ('{"input": "a", "more": 1}', "a"),
        ('{"more": 1, "input": "a"}', "a"),
        ('{"\\u0069nput": "a"}', "a"),
        ('{"input": 5}', '{"input": 5}'),
        ('{"input": null}', '{"input": null}'),
        ('{"cmd": "ls"}', '{"cmd": "ls"}'),
        ("{}", "{}"),
        ("", ""),
        ("  ", "  "),
        ("[1]", "[1]"),
        ('"text"', '"text"'),
        ("{ const a = 1; }", "{ const a = 1; }"),
        ('{"inp', '{"inp'),
        ('{"input": "cut \\', "cut "),
        ('{"input": "cut \\u00', "cut "),
        ('{"input": "cut \\ud83d', "cut "),
        ('{"input": "cut \\ud83d\\ude', "cut "),
        ('{"input": "a\nb"}', "a\nb"),
        ('{"input": "\\d+ \\u12zz"}', "\\d+ \\u12zz"),
        ('{"input": "\\ud83d\\ude00"}', "\U0001f600"),
        ('{"input": "\\ud83d"}', "\ufffd"),
        ('{"input": "\\ud83d\\n"}', "\ufffd\n"),
        ('{"input": "\\ud83d\\\\"}', "\ufffd\\"),
        ('{"input": "\\ude00\\ud83d\\ud83d\\ude00"}', "\ufffd\ufffd\U0001f600"),
        ('{"input": "a"} and more', "a"),
        ("{" + '"a":[' * 100_000, "{" + '"a":[' * 100_000),
    ],
)
def test_examples(arguments: str, want: str):
    assert unwrap(arguments) == want
    if len(arguments) < 100:
        assert _feed(list(arguments)) == want


def test_text_is_given_out_as_it_arrives():
    unwrapper = InputUnwrapper()
    got = [unwrapper.feed(f) for f in ('{"in', 'put": "', "ab", "c\\", "nd", '"', "}")]
    assert got == ["", "", "ab", "c", "\nd", "", ""]
    assert unwrapper.complete
    assert unwrapper.finish() == ""
    plain = InputUnwrapper()
    assert [plain.feed("text("), plain.feed("1)")] == ["text(", "1)"]


@pytest.mark.parametrize(
    ("arguments", "complete"),
    [('{"input": "a"', True), ('{"input": "a', False), ("raw", False), ('{"x":1,"input":"a"}', True)],
)
def test_complete_says_whether_the_input_has_its_end(arguments: str, complete: bool):
    unwrapper = InputUnwrapper()
    unwrapper.feed(arguments)
    unwrapper.finish()
    assert unwrapper.complete is complete
