"""Logprobs as OpenAI's APIs write them.

Source: platform.openai.com/docs/api-reference/chat/object (`choices[].logprobs.content`) and
platform.openai.com/docs/api-reference/responses/object (`logprobs` of an `output_text` part).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polar_mitm.types import TokenLogprob


def logprob_objects(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """One object for each token, in their order."""
    return [{**_token(t), "top_logprobs": [_token(top) for top in t.top]} for t in tokens]


def _token(token: TokenLogprob) -> dict[str, Any]:
    # JSON has no infinity; the API's word for "next to impossible" is -9999.
    logprob = token.logprob if token.logprob > -9999.0 else -9999.0
    return {"token": token.token, "logprob": logprob, "bytes": token.bytes or list(token.token.encode())}
