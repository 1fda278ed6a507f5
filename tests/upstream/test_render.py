"""Questions to the engine besides answers, what their answers say, and which answers are remembered."""

from __future__ import annotations

import json

import pytest

from polar_mitm.token_ids import TokenIds
from polar_mitm.upstream.engine import Template
from polar_mitm.upstream.render import (
    Answers,
    Lookup,
    detokenize,
    detokenized,
    learnt,
    render,
    rendered,
    template_probes,
    with_prompt,
)


def test_a_body_with_its_prompt_as_ids_is_the_body_and_the_ids() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"a } b"}]}'
    given = {"kv_transfer_params": {"prompt_token_ids": [1, 22, 3]}}
    assert json.loads(with_prompt(body, TokenIds(b"1,22,3"))) == {**json.loads(body), **given}


def test_lookups_that_differ_have_different_keys() -> None:
    lookups = [
        render(b"1"),
        render(b"2"),
        detokenize("m", b"1"),
        detokenize("m", b"1,2"),
        detokenize("n", b"1"),
    ]
    assert len({lookup.key for lookup in lookups}) == len(lookups)
    assert render(b"1").key == render(b"1").key
    assert json.loads(detokenize('m"', b"1,2").body) == {"model": 'm"', "tokens": [1, 2]}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b'{"token_ids": null}',
        b'{"token_ids": null, "stop": []}',
        b'{"token_ids": [1, -2]}',
        b'{"token_ids": [1, 2',
        b'{"token_ids": [[1, 2]]}',
        b'{"request_id": "\\"token_ids\\": [1]"}',
    ],
)
def test_what_is_no_rendering_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError):
        rendered(answer)


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"prompt": 1}'])
def test_what_is_no_text_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError):
        detokenized(answer)


def test_the_ids_of_a_rendering() -> None:
    assert list(rendered(b'{"request_id": "x", "token_ids": [1, 2,\n 3], "more": {}}')) == [1, 2, 3]
    assert detokenized(b'{"prompt": "caf\\u00e9"}') == "caf\u00e9"


def test_the_oldest_answers_go_first() -> None:
    answers = Answers(max_bytes=10)
    for key, answer in ((b"a", b"1234"), (b"b", b"1234")):
        answers.put(key, answer)
    assert answers.get(b"a") == b"1234"  # used: now the younger one
    answers.put(b"c", b"123")
    assert [answers.get(key) for key in (b"a", b"b", b"c")] == [b"1234", None, b"123"]
    answers.put(b"c", b"12")  # in place of the other
    answers.put(b"d", b"1234")
    assert [answers.get(key) for key in (b"a", b"c", b"d")] == [b"1234", b"12", b"1234"]
    answers.put(b"e", b"12345678901")
    assert answers.get(b"e") is None  # larger than all of it
    assert isinstance(Lookup("/x", b"").key, bytes)


def test_what_renderings_say_of_a_template() -> None:
    asked, history, one, other = b"1,2,7", b"1,2", b"1,2,3,9,4,7", b"1,2,3,8,9,4,7"

    def learn(*texts: bytes) -> Template | None:
        return learnt([TokenIds(text) for text in texts])

    assert len(template_probes("m")) == 4
    assert learn(asked, history, one, b"1,2,3,8,4,7") == Template(b"7", 4)
    assert learn(asked, history, one, other) == Template(b"7", 9)  # the longest common end
    assert learn(asked, history, one, b"1,2,3,9,4,5") == Template(b"7", None)
    assert learn(history, asked, one, other) is None  # no generation prompt
    assert learn(asked, asked, one, other) is None
    assert learn(b"1,27", b"1,2", one, other) is None  # an id that begins alike
