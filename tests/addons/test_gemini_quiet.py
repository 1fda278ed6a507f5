"""Gemini's answers that have nothing to stream but their end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polar_mitm.conformance.scripts import Answer, always
from polar_mitm.sse import SSEDecoder
from tests.addons.test_sdks import Running
from tests.support.rig import http_at

URL = "https://generativelanguage.googleapis.com/v1beta/models/m:streamGenerateContent"
ASK: dict[str, Any] = {
    "contents": [{"role": "user", "parts": [{"text": "go"}]}],
    "tools": [{"functionDeclarations": [{"name": "f"}]}],
}


@pytest.mark.parametrize("answer", [Answer(tool_calls=[("f", "{}")]), Answer(reasoning="hm"), Answer()])
@pytest.mark.parametrize("query", ["?alt=sse", ""])
async def test_an_answer_that_is_only_its_end(answer: Answer, query: str) -> None:
    async with (
        Running(always(answer)) as (box, _),
        http_at(box.port, box.interceptor.ca_pem) as client,
        client.post(URL + query, json=ASK) as got,
    ):
        status, wire = got.status, await got.read()
    assert status == 200, wire
    values = [json.loads(e.data) for e in SSEDecoder().feed(wire)] if query else json.loads(wire)
    assert values[-1]["candidates"][0]["finishReason"] == "STOP"
