"""The official SDK as a client of whole exchanges: what it asks, echoes and reads, and what is recorded."""

import json
from typing import Any

import openai
import pytest

from polar_mitm.asking import UpstreamRequest
from polar_mitm.config import Settings
from polar_mitm.conformance.scripts import Answer
from polar_mitm.dialects.base import Reply
from polar_mitm.dialects.ids import sibling
from polar_mitm.dialects.openai_chat import OpenAIChat
from polar_mitm.exchange import Exchange
from polar_mitm.lineage import Lineage
from polar_mitm.types import ModelCall, TextPart, Wire
from polar_mitm.upstream.engine import EngineInfo
from tests.dialects.responses_sdk import _http
from tests.support.engine_bytes import events, sampled

ENGINE = EngineInfo("http://engine", "tiny", max_model_len=4096)
TOOL: Any = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}
GO: Any = {"role": "user", "content": "go"}


class Talk:
    """One rollout: the SDK's requests go through exchanges to an engine that says `answers` in turn.

    An answer may be the bytes of a stream, or a status and a body.
    """

    def __init__(self, *answers: Answer | bytes | tuple[int, bytes]) -> None:
        self.records: list[ModelCall] = []
        self.sent: list[dict[str, Any]] = []
        self._answers = iter(answers)
        self._lineage = Lineage()
        http = openai.DefaultHttpxClient(transport=_http.MockTransport(self._serve))
        self.sdk = openai.OpenAI(
            api_key="none", base_url="https://api.openai.com/v1", max_retries=0, http_client=http
        )

    def _serve(self, request: Any) -> Any:
        settings, seq = Settings(continuation=False), len(self.records)
        exchange = Exchange(OpenAIChat(), ENGINE, settings, rollout_id="r", seq=seq, lineage=self._lineage)
        wire = Wire("POST", "api.openai.com", request.url.path, [], request.content)
        step = exchange.start(wire, dict(request.headers))
        headers, body = {}, b""
        if isinstance(step, UpstreamRequest):
            self.sent.append(json.loads(step.body))
            answer = next(self._answers)
            if isinstance(answer, tuple):
                step = exchange.reject(*answer)
            else:
                headers = exchange.open() if step.stream else {}
                made = [answer] if isinstance(answer, bytes) else events(answer, **_asked(self.sent[-1]))
                body = b"".join(map(exchange.feed, made))
                step = exchange.finish()
        self.records += exchange.records(delivered=True)
        if isinstance(step, Reply):
            return _http.Response(step.status, content=step.body, headers=step.headers)
        assert isinstance(step, bytes)
        return _http.Response(200, content=body + step, headers=headers)


def _asked(body: dict[str, Any]) -> dict[str, Any]:
    return {name: body[name] for name in ("n", "top_logprobs") if name in body}


def ask(talk: Talk, stream: bool, messages: list[Any], **fields: Any) -> Any:
    """The SDK's answer, by its streaming helper or whole."""
    completions = talk.sdk.chat.completions
    if not stream:
        return completions.create(model="asked", messages=messages, **fields)
    with completions.stream(model="asked", messages=messages, **fields) as events:
        return events.get_final_completion()


def ids(answer: Answer) -> list[int]:
    return [token.token_id for token in sampled(answer)]


both = pytest.mark.parametrize("stream", [True, False])
CALLS = Answer(text="Now.", reasoning="hm", tool_calls=[("bash", '{"command": "ls"}'), ("bash", "{}")])
DONE = Answer(text="Done.")


@both
def test_a_task_of_two_turns(stream: bool):
    talk = Talk(CALLS, DONE)
    first = ask(talk, stream, [GO], tools=[TOOL]).choices[0].message
    assert [(c.function.name, c.function.arguments) for c in first.tool_calls] == list(CALLS.tool_calls)
    assert first.reasoning_content == first.reasoning == "hm"
    results = [{"role": "tool", "tool_call_id": c.id, "content": "ok"} for c in first.tool_calls]
    # As the SDK's users do: the message that came is put into the history.
    echo = first.model_dump(
        exclude={"parsed": True, "tool_calls": {"__all__": {"index", "parsed_arguments"}}}
    )
    second = ask(talk, stream, [GO, echo, *results], tools=[TOOL])
    assert second.choices[0].message.content == "Done." and second.choices[0].finish_reason == "stop"
    one, two = talk.records
    assert (one.status, one.route, one.dialect) == ("ok", "POST /v1/chat/completions", "openai_chat")
    assert one.completion_token_ids == ids(CALLS) and two.completion_token_ids == ids(DONE)
    assert (one.model_requested, one.model_served) == ("asked", "tiny")
    assert two.parent_call_id == one.call_id
    assert [m["role"] for m in talk.sent[1]["messages"]] == ["user", "assistant", "tool", "tool"]
    assert talk.sent[1]["messages"][1]["reasoning"] == "hm"


@both
def test_an_answer_without_calls_is_known_by_its_text(stream: bool):
    talk = Talk(DONE, DONE)
    first = ask(talk, stream, [GO]).choices[0].message
    ask(talk, stream, [GO, {"role": "assistant", "content": first.content}, {"role": "user", "content": "?"}])
    assert talk.records[1].parent_call_id == talk.records[0].call_id


@both
def test_several_answers_are_several_records_and_any_may_be_gone_on_from(stream: bool):
    talk = Talk(Answer(text="A", others=(CALLS,)), DONE)
    answer = ask(talk, stream, [GO], tools=[TOOL], n=2)
    one, two = talk.records
    assert two.call_id == sibling(one.call_id, 1)
    assert one.answer is not None and one.answer.content == [TextPart("A")]
    assert [c.index for c in answer.choices] == [0, 1] and answer.choices[0].message.content == "A"
    said = answer.choices[1].message
    assert [c.function.arguments for c in said.tool_calls] == [a for _, a in CALLS.tool_calls]
    assert two.completion_token_ids == ids(CALLS)
    echo = {"role": "assistant", "content": said.content, "reasoning": said.reasoning}
    echo["tool_calls"] = [
        {"id": c.id, "type": "function", "function": {"name": "bash", "arguments": c.function.arguments}}
        for c in said.tool_calls
    ]
    results = [{"role": "tool", "tool_call_id": c.id, "content": "ok"} for c in said.tool_calls]
    ask(talk, stream, [GO, echo, *results], tools=[TOOL])
    assert talk.records[2].parent_call_id == two.call_id


@both
@pytest.mark.parametrize("num", [1, 2])
def test_logprobs_are_the_engines(stream: bool, num: int):
    talk = Talk(DONE)
    answer = ask(talk, stream, [GO], logprobs=True, top_logprobs=2, n=num)
    for record, choice in zip(talk.records, answer.choices, strict=True):
        shown = choice.logprobs.content
        assert [t.logprob for t in shown] == pytest.approx(record.behaviour_logprobs)
        assert bytes(b for t in shown for b in t.bytes).startswith(b"Done.")
        assert {len(t.top_logprobs) for t in shown} == {2}


def test_what_is_asked_for_reaches_the_engine():
    talk = Talk(Answer(text="{}"))
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ=="}}
    talk.sdk.chat.completions.create(
        model="asked",
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [image]}],  # type: ignore
        response_format=form,
        stop=["END"],
        max_completion_tokens=7,
    )
    (sent,) = talk.sent
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "[image]"},
    ]  # fmt: skip
    assert (sent["stop"], sent["max_tokens"]) == (["END"], 7)
    assert sent["response_format"]["json_schema"]["schema"] == schema


def test_a_forced_tool_reaches_the_engine():
    talk = Talk(CALLS)
    choice: Any = {"type": "function", "function": {"name": "bash"}}
    ask(talk, False, [GO], tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert talk.sent[0]["tool_choice"] == choice and talk.sent[0]["parallel_tool_calls"] is False


@both
def test_a_prompt_that_is_too_long(stream: bool):
    said = (
        b'{"error": {"message": "This model\'s maximum context length is 4096 tokens. However, you requested '
    )
    talk = Talk((400, said + b'5000 tokens."}}'))
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens") as caught:
        ask(talk, stream, [GO])
    assert caught.value.code == "context_length_exceeded"


@both
def test_an_engine_that_breaks(stream: bool):
    talk = Talk(b"".join(events(DONE)[:2]) + b'data: {"error": {"message": "out of memory"}}\n\n')
    with pytest.raises(openai.APIError if stream else openai.InternalServerError, match="out of memory"):
        ask(talk, stream, [GO])
    assert [r.status for r in talk.records] == ["failed"]
