"""One answer as it comes: nothing of it is lost, whatever the pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polar_mitm.dialects.ids import minted
from polar_mitm.gathered import Gathered, further, shares
from polar_mitm.types import ChatRequest, Delta, ModelCall, Tool, ToolCallDelta, Usage

CALL = "01JD0Z6Q3WAAAAAAAAAAAAAAAZ"
REQUEST = ChatRequest("m", [], [Tool("patch", kind="custom", namespace="n")])
_parts = st.builds(
    ToolCallDelta, st.integers(-1, 3), st.sampled_from([None, "", "n__patch", "other"]), st.text(max_size=5)
)
_deltas = st.lists(
    st.builds(
        Delta,
        st.text(max_size=5),
        st.text(max_size=5),
        st.lists(_parts, max_size=2),
        st.lists(st.integers(0, 9), max_size=3),
        st.lists(st.floats(-9, 0), max_size=3),
        finish_reason=st.sampled_from([None, None, "stop", "length", "abort"]),
    ),
    max_size=8,
)


def gathered() -> Gathered:
    return Gathered(ModelCall(CALL, "r", 0, "d", "POST /", "ok"))


@given(_deltas)
def test_nothing_that_came_is_lost(deltas: list[Delta]) -> None:
    answer, at = gathered(), iter(range(100))
    for delta in deltas:
        answer.add(delta, lambda: next(at), "v")
    done = answer.completion
    answer.settle(REQUEST, "call")
    message = done.message
    assert done.completion_token_ids == [i for d in deltas for i in d.token_ids]
    assert done.behaviour_logprobs == [p for d in deltas for p in d.logprobs]
    assert message.text == "".join(d.text for d in deltas)
    assert message.reasoning == ("".join(d.reasoning for d in deltas) or None)
    parts = [p for d in deltas for p in d.tool_calls]
    numbers = sorted({p.index for p in parts})
    assert [c.id for c in message.tool_calls] == [minted("call", CALL, n) for n in numbers]
    for number, call in zip(numbers, message.tool_calls, strict=True):
        mine = [p for p in parts if p.index == number]
        assert call.arguments == "".join(p.arguments for p in mine)
        named = mine[0].name or ""
        wanted = ("patch", "custom", "n") if named == "n__patch" else (named, "function", None)
        assert (call.name, call.kind, call.namespace) == wanted
    reasons = [d.finish_reason for d in deltas if d.finish_reason]
    assert answer.whole == (bool(reasons) and reasons[-1] != "abort")
    assert (answer.call.first_token_at is None) == (not done.completion_token_ids)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 40))
def test_shares_add_up_or_each_is_seen_to_be_amiss(counts: list[int], counted: int) -> None:
    total = Usage(7, counted, 3, 2)
    each = shares(total, counts)
    assert len(each) == len(counts) and {u.prompt_tokens for u in each} == {7}
    if len(counts) == 1 or not counted:
        assert each == [total] * len(counts)
    elif counted == sum(counts):
        assert [u.completion_tokens for u in each] == counts
    else:
        assert all(u.completion_tokens != n for u, n in zip(each, counts, strict=True))


@given(st.lists(st.text(max_size=9), max_size=3))
def test_a_further_record_names_the_first_and_leaves_it_alone(notes: list[str]) -> None:
    first, own = gathered().call, gathered().call
    first.notes, first.wire.request_body, own.call_id = list(notes), b"x", "other"
    made = further(first, own)
    assert made.answer_of == next((n[10:] for n in notes if n.startswith("answer_of:")), CALL)
    assert (made.call_id, made.wire.request_body, first.notes) == ("other", b"", notes)
