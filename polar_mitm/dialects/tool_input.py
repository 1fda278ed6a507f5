"""Arguments of a tool call for the APIs that carry them as a JSON object, where models sample text.

What was sampled and is no JSON object takes the shape that Claude Code itself gives to arguments it cannot
parse; decoding undoes it, so that nothing is lost.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import msgspec
from msgspec import Raw, Struct, field

from polar_mitm.errors import PolarError


class _Unparsed(Struct):
    raw: str


class _UnparsedInput(Struct):
    unparsed: _Unparsed = field(name="__unparsedToolInput")


_is_object = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_unparsed = msgspec.json.Decoder(_UnparsedInput).decode
_JSON_TOKEN = re.compile(r'("(?:[^"\\]++|\\.)*+")|([:,])|\s+')


def as_object(arguments: str) -> Raw | dict[str, Any]:
    """Arguments as sampled, as the object that the API wants: as they stand where they are one."""
    try:
        _is_object(arguments)
    except (msgspec.MsgspecError, RecursionError):
        return (
            {"__unparsedToolInput": {"raw": arguments, "len": len(arguments.encode())}}
            if arguments.strip()
            else {}
        )
    return Raw(arguments.encode())


def as_text(raw: Raw, where: str) -> str:
    """The object that a harness sends back, as argument text; `where` names the field for errors.

    The model sampled text, the harness parsed it and wrote it compactly. Spaces after `,` and `:` are what
    chat templates write (`tojson`) and models therefore sample; keys, numbers and strings stay untouched.

    Raises:
        PolarError: kind `bad_request`, for anything but an object.
    """
    text = bytes(raw).decode()
    if not text.startswith("{"):
        raise PolarError("bad_request", f"{where}: expected an object")
    if text.startswith('{"__unparsedToolInput"'):
        with contextlib.suppress(msgspec.MsgspecError):
            return _decode_unparsed(raw).unparsed.raw
    return _JSON_TOKEN.sub(lambda m: m[1] or (m[2] and m[2] + " ") or "", text)
