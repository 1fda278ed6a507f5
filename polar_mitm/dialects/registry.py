"""The dialects by name: one instance of each serves all calls."""

from __future__ import annotations

from polar_mitm.dialects.anthropic import Anthropic
from polar_mitm.dialects.base import Dialect
from polar_mitm.dialects.gemini import Gemini
from polar_mitm.dialects.openai_chat import OpenAIChat
from polar_mitm.dialects.openai_responses import OpenAIResponses

DIALECTS: dict[str, Dialect] = {d.name: d for d in (Anthropic(), OpenAIResponses(), OpenAIChat(), Gemini())}
