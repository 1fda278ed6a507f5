"""Which answers hold a tool call that no harness can carry out. No torch here."""

from __future__ import annotations

from typing import Any

import msgspec

from polar_mitm.types import Message, ToolCall

_OPENING = "<tool_call>"  # of the Qwen family's templates: left in the text where the engine's parser gave up


def is_malformed(answer: Message) -> bool:
    """Whether some tool call in it has arguments that are no JSON object, or was not even recognised.

    Free text is what a `custom` tool takes, so no argument of one is malformed.
    """
    return _OPENING in answer.text or any(not _parses(call) for call in answer.tool_calls)


def _parses(call: ToolCall) -> bool:
    if call.kind == "custom":
        return True
    try:
        msgspec.json.decode(call.arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True
