"""The bytes of one engine answer, for tests that need no server."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from polar_mitm.conformance import byte_tokens, engine_wire
from polar_mitm.conformance.engine_wire import EngineCall, Token
from polar_mitm.conformance.scripts import Answer

PROMPT = "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
PROMPT_IDS = byte_tokens.encode(PROMPT)
_ASKED: dict[str, Any] = {
    "return_token_ids": True,
    "logprobs": True,
    "stream_options": {"include_usage": True},
}


def events(answer: Answer, *, prompt_ids: list[int] = PROMPT_IDS, **asked: Any) -> list[bytes]:
    """The engine's stream, event by event; the last is `[DONE]`. `asked`: further request fields."""
    body = _ASKED | asked
    made = engine_wire.choices(answer, body, 0, math.inf)
    first, *others = [[t.token_id for t in each.tokens] for each in made]
    call = EngineCall(0, "scripted", body, prompt_ids, first, others)
    return [event for event, _ in engine_wire.stream(answer, call, made)]


def sampled(answer: Answer) -> list[Token]:
    """Every token of the answer."""
    return engine_wire.sample(answer, 0)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` in pieces, cut where `cuts` say (modulo its length)."""
    at = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(at)]
