"""What cannot be read, in the place of each item of each recorded request: a request, or a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.dialects.registry import DIALECTS
from polar_mitm.errors import PolarError
from tests.support.mutation import places

FIXTURES = Path(__file__).parents[2] / "fixtures"
FOLDERS = {
    "anthropic": "anthropic",
    "openai_responses": "responses",
    "openai_chat": "chat",
    "gemini": "gemini",
}
PATH = "/v1beta/models/m:generateContent"  # only Gemini's says anything
UNREADABLE = {
    "not UTF-8": b'"\xff"',
    "not UTF-8 inside": b'{"output":"\xff"}',
    "a key that is not": b'{"\xff":1}',
    "half a character": b'"\\ud800"',
    "half a character inside": b'{"output":"\\ud800"}',
    "no escape": b'"\\x"',
    "deep": b"[" * 3000 + b"]" * 3000,
    "deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "many digits": b"9" * 5000,
    "beyond a float": b"1e999",
    "beyond 64 bits": b"18446744073709551617",
    "a key twice": b'{"type":"text","type":1}',
}


@pytest.mark.parametrize("dialect", FOLDERS)
@pytest.mark.parametrize("what", UNREADABLE)
def test_it_is_decoded_or_refused(dialect: str, what: str) -> None:
    for file in sorted((FIXTURES / FOLDERS[dialect]).glob("*.json")):
        value = json.loads(file.read_text())
        body = value.get("body", value)
        for holder, key in list(places(body)):
            decode(dialect, put(body, holder, key, UNREADABLE[what]))


def put(body: Any, holder: Any, key: Any, raw: bytes) -> bytes:
    """The body as JSON, with these bytes in the place of `holder[key]`."""
    was, holder[key] = holder[key], "@here@"
    text = json.dumps(body).encode()
    holder[key] = was
    return text.replace(b'"@here@"', raw)


def decode(dialect: str, raw: bytes) -> None:
    try:
        DIALECTS[dialect].decode(raw, {}, PATH)
    except PolarError as error:
        assert error.kind == "bad_request" and error.message
