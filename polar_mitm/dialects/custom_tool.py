"""Custom (free-text) tools for engines whose models only know JSON arguments.

The engine is offered a function with one string property, `input`; what it samples, `{"input": "..."}`, is
unwrapped here as it arrives, so that the harness streams plain text. What is not of that shape is the input
as it stands.
"""

from __future__ import annotations

import json
import re
from typing import Any

INPUT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The whole input of the tool, as plain text."}},
    "required": ["input"],
    "additionalProperties": False,
}

_WS = r"[ \t\n\r]*"
_HEAD = re.compile(rf'{_WS}\{{{_WS}"input"{_WS}:{_WS}"')
_STOP = re.compile(r'["\\]')
_HIGH = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_ESCAPE = re.compile(rf'{_HIGH}\\u[dD][c-fC-F][0-9a-fA-F]{{2}}|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{{4}})')
_CUT_ESCAPE = re.compile(rf"(?:{_HIGH})?(?:\\(?:u[0-9a-fA-F]{{0,3}})?)?\Z")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class InputUnwrapper:
    """Arguments in, input out, for any split of the arguments; nothing is lost or given twice.

    Text is given out as soon as it can be nothing else. A lone surrogate becomes U+FFFD (it has no UTF-8
    form), an escape that JSON does not know stays as written. Arguments that begin like JSON but in another
    shape are held back until `finish`.
    """

    def __init__(self) -> None:
        self.complete = False
        """The input has its end: a closing quote was seen, or `finish` could read the JSON."""
        self._state = "head"
        self._held = ""

    def feed(self, fragment: str) -> str:
        """The next fragment of the arguments; returns the input text it settles."""
        if self._state == "text":
            return self._text(fragment)
        if self._state == "raw":
            return fragment
        if self._state == "closed":
            return ""
        self._held += fragment
        if head := _HEAD.match(self._held):
            rest, self._held, self._state = self._held[head.end() :], "", "text"
            return self._text(rest)
        begin = self._held.lstrip(" \t\n\r")
        if begin and begin[0] != "{":
            raw, self._held, self._state = self._held, "", "raw"
            return raw
        return ""

    def finish(self) -> str:
        """The arguments have ended; returns what was held back."""
        held, self._held = self._held, ""
        if self._state != "head":
            return ""  # at most half an escape, of arguments that were cut off
        self._state = "closed"
        try:
            value = json.loads(held, strict=False)
        except (ValueError, RecursionError):
            return held
        if not isinstance(value, dict) or not isinstance(value.get("input"), str):
            return held
        self.complete = True
        return _LONE_SURROGATE.sub("\ufffd", value["input"])

    def _text(self, fragment: str) -> str:
        text = self._held + fragment if self._held else fragment
        self._held = ""
        out: list[str] = []
        at = 0
        while stop := _STOP.search(text, at):
            out.append(text[at : stop.start()])
            at = stop.start()
            if text[at] == '"':
                self._state, self.complete = "closed", True
                return "".join(out)
            if _CUT_ESCAPE.match(text, at):
                self._held = text[at:]
                return "".join(out)
            if escape := _ESCAPE.match(text, at):
                out.append(_LONE_SURROGATE.sub("\ufffd", json.loads(f'"{escape.group()}"')))
                at = escape.end()
            else:
                out.append("\\")
                at += 1
        out.append(text[at:])
        return "".join(out)


def unwrap(arguments: str) -> str:
    """The input inside whole arguments, as `InputUnwrapper` gives it for any split of them."""
    unwrapper = InputUnwrapper()
    return unwrapper.feed(arguments) + unwrapper.finish()
