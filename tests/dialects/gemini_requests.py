"""Gemini requests for tests, short to write, and what they are decoded to."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from polar_mitm.dialects.gemini import Gemini
from polar_mitm.dialects.ids import seal
from polar_mitm.errors import PolarError
from polar_mitm.types import (
    ChatRequest,
    Message,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "gemini"
PATH = "/v1beta/models/gemini-x:generateContent"
CALL = "01JD0Z6Q3W8F4M2N5P7R9T1V3X"
OTHER = "01JD0Z6Q3W8F4M2N5P7R9T1V40"
dialect = Gemini()


def decode(path: str = PATH, **fields: Any) -> ChatRequest:
    body = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}], **fields}
    return dialect.decode(json.dumps(body).encode(), {}, path)


def contents(*turns: tuple[str, list[Any]]) -> list[Message]:
    return decode(contents=[{"role": role, "parts": parts} for role, parts in turns]).messages


def refusal(body: bytes, path: str = PATH) -> str:
    with pytest.raises(PolarError) as caught:
        dialect.decode(body, {}, path)
    assert caught.value.kind == "bad_request"
    return caught.value.message


def refused(**fields: Any) -> str:
    body = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}], **fields}
    return refusal(json.dumps(body).encode())


def signature(call_id: str = CALL, text: str | None = None, urlsafe: bool = False) -> str:
    encode = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    return encode(seal(call_id, text).encode()).decode()


def called(name: str, args: Any = None, **more: Any) -> dict[str, Any]:
    return {"functionCall": {"name": name, "args": args or {}, **more}}


def responded(name: str, response: Any, **more: Any) -> dict[str, Any]:
    return {"functionResponse": {"name": name, "response": response, **more}}


def fixture(name: str) -> ChatRequest:
    call = json.loads((FIXTURES / f"{name}.json").read_text())
    return dialect.decode(
        json.dumps(call["body"], ensure_ascii=False).encode(), call["headers"], call["path"]
    )
