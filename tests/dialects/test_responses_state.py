"""What a Responses request may refer to: items of earlier responses, as they were on the wire."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.openai_responses import OpenAIResponses
from polar_mitm.dialects.responses_state import PreviousResponseNotFound, Responses
from polar_mitm.errors import PolarError
from polar_mitm.types import Wire

NAME = "openai_responses"
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "a"}],
}


def said(response_id: str, *output: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    return {"id": response_id, "object": "response", "status": status, "output": list(output)}


def whole_answer(response: dict[str, Any]) -> bytes:
    return json.dumps(response).encode()


def event_stream(response: dict[str, Any]) -> bytes:
    first = {"type": "response.created", "response": {**response, "status": "in_progress", "output": []}}
    last = {"type": f"response.{response['status']}", "response": response}
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in (first, last))


def lines(response: dict[str, Any]) -> bytes:
    events = event_stream(response).split(b"\n")
    return b"".join(line[6:] + b"\n" for line in events if line.startswith(b"data: "))


FORMS = [whole_answer, event_stream, lines]


def wire(response: bytes, given: Any, *, method: str = "POST", **fields: Any) -> Wire:
    body = {"model": "m", "input": given, **fields}
    return Wire(method, request_body=json.dumps(body).encode(), response_body=response)


def whole(responses: Responses, **body: Any) -> list[Any]:
    """The items that a request comes to."""
    made = json.loads(responses.whole(NAME, json.dumps({"model": "m", **body}).encode()))
    assert made["model"] == "m" and "previous_response_id" not in made
    assert made.get("continued_response_id") == body.get("previous_response_id")
    found: list[Any] = made["input"]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_chain_of_three(form: Any) -> None:
    responses = Responses()
    responses.keep(NAME, wire(form(said("resp_1", SAID)), "one"))
    two = [{"role": "user", "content": "two"}]
    second = wire(form(said("resp_2", {**SAID, "id": "msg_2"})), two, previous_response_id="resp_1")
    responses.keep(NAME, second)
    one = {"type": "message", "role": "user", "content": "one"}
    three = {"role": "user", "content": "three"}
    expected = [one, SAID, *two, {**SAID, "id": "msg_2"}, three]
    assert whole(responses, previous_response_id="resp_2", input=[three]) == expected
    assert whole(responses, previous_response_id="resp_1") == expected[:2]  # from there, another way
    text = whole(responses, previous_response_id="resp_1", input='é"')
    assert text[-1] == {"type": "message", "role": "user", "content": 'é"'}


def test_items_are_kept_as_they_were_written() -> None:
    responses = Responses()
    odd = b'{ "type":"message","role":"user", "content":"\\u00e9  1.0e0" }'
    body = b'{"model":"m","input":[%b],"seed":1.50}' % odd
    responses.keep(NAME, Wire("POST", request_body=body, response_body=whole_answer(said("resp_1"))))
    asked = b'{"model":"m","previous_response_id":"resp_1","seed":1.50}'
    made = responses.whole(NAME, asked)
    assert odd in made and b"1.50" in made


def test_what_refers_to_nothing_is_left_as_it_is() -> None:
    body = b'{ "model": "m", "input": "x" }'
    assert Responses().whole(NAME, body) is body
    body = b'{"messages":[],"previous_response_id":"resp_1"}'
    assert Responses().whole("openai_chat", body) is body


@pytest.mark.parametrize(
    ("method", "fields", "status", "kept"),
    [
        ("POST", {}, "completed", True),  # to store is the API's default
        ("POST", {"store": True}, "completed", True),
        ("POST", {"store": None}, "completed", True),
        ("POST", {"store": False}, "completed", False),
        ("WS", {"store": False}, "completed", True),  # the connection remembers
        ("WS", {"generate": False}, "completed", True),
        ("POST", {}, "incomplete", True),
        ("POST", {}, "failed", False),
    ],
)
def test_what_is_kept(method: str, fields: dict[str, Any], status: str, kept: bool) -> None:
    responses = Responses()
    responses.keep(NAME, wire(whole_answer(said("resp_1", status=status)), "x", method=method, **fields))
    if kept:
        assert len(whole(responses, previous_response_id="resp_1")) == 1
    else:
        with pytest.raises(PreviousResponseNotFound):
            whole(responses, previous_response_id="resp_1")


def test_the_answers_of_other_dialects_are_not_kept() -> None:
    responses = Responses()
    responses.keep("anthropic", wire(whole_answer(said("resp_1")), "x"))
    with pytest.raises(PreviousResponseNotFound):
        whole(responses, previous_response_id="resp_1")


def test_an_unknown_response_is_told_in_the_apis_words() -> None:
    with pytest.raises(PreviousResponseNotFound) as raised:
        whole(Responses(), previous_response_id="resp_9")
    reply = OpenAIResponses().encode_error(raised.value, "")
    assert reply.status == 400
    assert json.loads(reply.body)["error"] == {
        "message": "Previous response with id 'resp_9' not found.",
        "type": "invalid_request_error",
        "param": "previous_response_id",
        "code": "previous_response_not_found",
    }


def test_a_reference_to_an_item_is_the_item() -> None:
    responses = Responses()
    responses.keep(NAME, wire(whole_answer(said("resp_1", SAID)), "x"))
    reference = {"type": "item_reference", "id": "msg_1"}
    again = [reference, {"role": "user", "content": "the text item_reference"}]
    assert whole(responses, input=again) == [SAID, again[1]]
    responses.keep(NAME, wire(whole_answer(said("resp_2")), again))  # what is kept holds no references
    assert whole(responses, previous_response_id="resp_2") == [SAID, again[1]]
    unknown = {"type": "item_reference", "id": "msg_9"}
    assert whole(responses, input=[unknown]) == [unknown]  # which decoding refuses, naming the item


@pytest.mark.parametrize("item", ["item_reference", {"type": "item_reference", "id": 5}])
def test_what_is_no_reference_is_left_to_decoding(item: object) -> None:
    responses = Responses()
    responses.keep(NAME, wire(whole_answer(said("resp_1", SAID)), "x"))
    assert whole(responses, input=[item]) == [item]
    assert whole(responses, input=[item], previous_response_id="resp_1")[1:] == [SAID, item]


def test_a_null_reference_refers_to_nothing() -> None:
    body = b'{"model": "m", "previous_response_id": null}'
    assert Responses().whole(NAME, body) == body


def test_the_least_recently_used_is_forgotten_first() -> None:
    responses = Responses(max_bytes=5_000)
    responses.keep(NAME, wire(whole_answer(said("old", {**SAID, "id": "msg_old"})), "x" * 1_500))
    responses.keep(NAME, wire(whole_answer(said("used", SAID)), "x" * 1_500))
    assert whole(responses, previous_response_id="old")
    responses.keep(NAME, wire(whole_answer(said("new")), "x" * 1_500))
    with pytest.raises(PreviousResponseNotFound):
        whole(responses, previous_response_id="used")
    assert whole(responses, input=[{"type": "item_reference", "id": "msg_1"}])[0]["type"] == "item_reference"
    assert whole(responses, previous_response_id="old") and whole(responses, previous_response_id="new")


def test_a_chain_in_use_is_not_forgotten_link_by_link() -> None:
    responses = Responses(max_bytes=5_500)
    responses.keep(NAME, wire(whole_answer(said("resp_0")), "x" * 1_500))
    for number in range(1, 4):
        previous = {"previous_response_id": f"resp_{number - 1}"}
        if number < 3:
            assert whole(responses, **previous)
        responses.keep(NAME, wire(whole_answer(said(f"resp_{number}")), "x" * 1_500, **previous))
    with pytest.raises(PolarError) as raised:  # it is whole, and too large
        whole(responses, previous_response_id="resp_3")
    assert raised.value.kind == "too_large"
    assert len(whole(responses, previous_response_id="resp_2")) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "input": JSON,
        "previous_response_id": JSON,
        "store": JSON,
        "id": JSON,
        "output": JSON,
        "status": st.just("completed") | JSON,
        "response": JSON,
        "type": JSON,
    },
).map(lambda fields: json.dumps(fields).encode()) | st.binary(max_size=40)


@given(asked=FIELDS, answered=FIELDS, later=FIELDS)
def test_nothing_but_an_error_of_ours_comes_of_nonsense(asked: bytes, answered: bytes, later: bytes) -> None:
    responses = Responses()
    responses.keep(NAME, Wire("WS", request_body=asked, response_body=answered))
    for body in (later, later[:-1] + b',"x":"previous_response_id","y":"item_reference"}'):
        try:
            made = responses.whole(NAME, body)
        except PolarError as error:
            assert error.kind in ("bad_request", "too_large")
        else:
            assert made == body or "previous_response_id" not in msgspec.json.decode(made)
