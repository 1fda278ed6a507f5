"""What an engine's errors mean to a harness, by the words that versions of vLLM have for them."""

from __future__ import annotations

import re
from typing import Any, cast

import msgspec

from polar_mitm.errors import UNREADABLE, Overflow, PolarError


def error_text(error: Any) -> str:
    """The engine's own words out of an error body or event, at most 500 characters."""
    if isinstance(error, dict):
        inner = error.get("error", error)
        error = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(cast(object, error))[:500]


# What versions of the engine say of a prompt, or a prompt and its answer, that the window does not hold.
_WINDOW = re.compile(
    r"maximum context length is (\d+)|maximum model length of (\d+)|maximum context length \((\d+)\)"
    r"|context length is only (\d+)"
)
_PROMPT = re.compile(
    r"(\d+) in the messages|(?:has|passed|contains)(?: at least)? (\d+) input tokens|\(length (\d+)\)"
    r"|Input length \((\d+)\)|(\d+) from the input|resulted in (\d+) tokens"
)


def _overflow(text: str) -> Overflow | None:
    """The prompt's length and the window, where the engine names both."""
    window, prompt = _WINDOW.search(text), _PROMPT.search(text)
    if window is None or prompt is None or window.lastindex is None or prompt.lastindex is None:
        return None
    return Overflow(int(prompt[prompt.lastindex]), int(window[window.lastindex]))


def rejection(status: int, body: bytes, retry_after_s: int) -> PolarError:
    """What an engine's non-200 answer means to a harness."""
    try:
        text = error_text(msgspec.json.decode(body))
    except UNREADABLE:
        text = body[:200].decode("utf-8", "replace") or "no body"
    if status == 400 and ("context length" in text or "longer than the maximum" in text):
        return PolarError("context_overflow", text, status=status, overflow=_overflow(text))
    if status in (400, 413, 422):
        return PolarError("bad_request", f"the engine refused the request: {text}", status=status)
    # Everything else is the engine's trouble, not the harness's: it may try again.
    message = f"engine answered {status}: {text}"
    return PolarError("overloaded", message, retry_after_s=retry_after_s, status=status)
