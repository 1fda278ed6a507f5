"""When a message that a harness echoes still is the message that it was given.

Harnesses send an answer back changed: trimmed, its JSON written anew, its reasoning left out. `HARMLESS` is
the whole list of changes after which the answer still counts as the same one; each use is named, so that a
record says what was overlooked. Anything else is another message.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any, Literal, get_args

import msgspec

from polar_mitm.dialects.custom_tool import unwrap
from polar_mitm.types import Message, TextPart, ToolCall, engine_tool_name

EDITS_VERSION = 1
"""Goes up with each change of what `Edit` lists or means."""

Edit = Literal[
    "trimmed_whitespace",  # white space at the ends of text or reasoning is gone, or all of a blank text
    "json_reserialised",  # arguments: the same JSON value, in another notation (blanks, escapes, 1.0 for 1)
    "key_order",  # arguments: the same JSON value, its keys in another order
    "empty_arguments",  # arguments: `{}` for nothing
    "reasoning_dropped",  # the reasoning is gone; harmless where the chat template drops it too
]
HARMLESS: tuple[Edit, ...] = get_args(Edit)


def same(before: Message, now: Message) -> bool:
    """Whether two messages read the same: their minted ids are not part of that."""
    return before == now or msgspec.structs.replace(before, minted_ids=now.minted_ids) == now


def edits_between(said: Message, echo: Message) -> list[Edit] | None:
    """The harmless edits that make `echo` of `said`, an answer of ours, in the order of `HARMLESS`.

    None where they differ otherwise. The minted ids count only as those of tool calls.
    """
    if said == echo:
        return []
    if echo.role != said.role or len(echo.tool_calls) != len(said.tool_calls):
        return None
    found: set[Edit] = set()
    if not _text_edits(_text(said), _text(echo), found):
        return None
    if echo.reasoning or not said.reasoning:
        if not _text_edits(said.reasoning or "", echo.reasoning or "", found):
            return None
    else:
        found.add("reasoning_dropped" if said.reasoning.strip() else "trimmed_whitespace")
    for ours, theirs in zip(said.tool_calls, echo.tool_calls, strict=True):
        if not _call_edits(ours, theirs, found):
            return None
    return [edit for edit in HARMLESS if edit in found]


def _text(message: Message) -> Any:
    """The text of a message that is text only; parts as they stand where it is not."""
    if all(isinstance(part, TextPart) for part in message.content):
        return message.text
    return message.content


def _text_edits(said: Any, echo: Any, found: set[Edit]) -> bool:
    if said == echo:
        return True
    if (
        isinstance(said, str)
        and isinstance(echo, str)
        and echo in (said.strip(), said.lstrip(), said.rstrip())
    ):
        found.add("trimmed_whitespace")
        return True
    return False


def _call_edits(said: ToolCall, echo: ToolCall, found: set[Edit]) -> bool:
    if (said.id, said.kind) != (echo.id, echo.kind):
        return False
    if engine_tool_name(said.name, said.namespace) != engine_tool_name(echo.name, echo.namespace):
        return False
    if said.arguments == echo.arguments:
        return True
    if said.kind == "custom":  # the harness was given the text inside
        return unwrap(said.arguments) == echo.arguments
    if not said.arguments.strip():
        found.add("empty_arguments")
        return echo.arguments == "{}"
    try:
        ours, theirs = _value(said.arguments), _value(echo.arguments)
    except (ValueError, RecursionError):
        return False
    if _notation(ours, False) == _notation(theirs, False):
        found.add("json_reserialised")
        return True
    if _notation(ours, True) == _notation(theirs, True):
        found.add("key_order")
        return True
    return False


def _value(text: str) -> Any:
    return json.loads(text, parse_float=number)


def number(text: str) -> float | int:
    """The value of a number with a fraction or an exponent; JavaScript writes 1.0 as 1.

    Raises:
        ValueError: no float holds the number.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    # By its shortest digits, and zeros: so JavaScript writes it, not by the float's every digit.
    return int(Decimal(repr(value))) if value.is_integer() else value


def _notation(value: Any, sort_keys: bool) -> str:
    """One notation for each JSON value; in Python, `True == 1`."""
    return json.dumps(value, sort_keys=sort_keys)
