"""Errors, headers and whole answers of Chat Completions, as the official SDK understands them."""

import json

import pytest

from polar_mitm.dialects.ids import minted
from polar_mitm.errors import ErrorKind, PolarError
from polar_mitm.types import ChatRequest, Delta, Message, TextPart, ToolCallDelta
from tests.dialects.chat_sdk import ASK, CALL, CREATED, DIALECT, client, completion_of
from tests.dialects.responses_sdk import check_error, each_error


@each_error
def test_each_error(kind: ErrorKind, status: int, type_: str, code: str | None, raised: type[Exception]):
    check_error(DIALECT, lambda sdk: sdk.chat.completions.create(**ASK), kind, status, type_, code, raised)


def test_retry_after_and_a_call_without_an_id():
    reply = DIALECT.encode_error(PolarError("overloaded", "busy", retry_after_s=5))
    assert reply.headers == {"content-type": "application/json", "retry-after": "5"}


@pytest.mark.parametrize(
    ("engine", "want"),
    [
        (
            "9 > 8",
            "This model's maximum context length is exceeded (9 > 8). "
            "Please reduce the length of the messages.",
        ),
        (
            "This model's maximum context length is 8 tokens. However, your messages resulted in 9 tokens.",
            "This model's maximum context length is 8 tokens. However, your messages resulted in 9 tokens. "
            "Please reduce the length of the messages.",
        ),
        (
            "This model's maximum context length is 8 tokens. Please reduce the length of the input.",
            "This model's maximum context length is 8 tokens. Please reduce the length of the input.",
        ),
    ],
)
def test_an_overflow_is_said_in_the_services_words(engine: str, want: str):
    error = json.loads(DIALECT.encode_error(PolarError("context_overflow", engine)).body)["error"]
    assert (error["param"], error["message"]) == ("messages", want)


def test_stream_headers():
    assert DIALECT.stream_headers(CALL) == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-request-id": minted("req", CALL),
    }


def test_a_whole_answer():
    asked = ChatRequest("m", [Message("user", [TextPart("hi")])])
    reply = DIALECT.encode(asked, completion_of(asked, [Delta("so", "why")]), CALL, CREATED)
    assert json.loads(reply.body) == {
        "id": minted("chatcmpl", CALL),
        "object": "chat.completion",
        "created": 1732100000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "so",
                    "refusal": None,
                    "annotations": [],
                    "reasoning_content": "why",
                    "reasoning": "why",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "total_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    sdk = client(reply).chat.completions.create(**ASK)
    assert sdk._request_id == minted("req", CALL) and sdk.choices[0].message.content == "so"


def test_an_empty_answer_is_an_empty_text_and_a_call_alone_has_none():
    asked = ChatRequest("m", [Message("user", [TextPart("hi")])])

    def content(*deltas: Delta) -> str | None:
        reply = DIALECT.encode(asked, completion_of(asked, list(deltas)), CALL, CREATED)
        return client(reply).chat.completions.create(**ASK).choices[0].message.content

    assert content() == ""
    assert content(Delta(tool_calls=[ToolCallDelta(0, "f", "{}")])) is None
